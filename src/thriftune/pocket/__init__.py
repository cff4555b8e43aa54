"""The pocket model: files only (config, tokenizer, chat template, weights). See README.md beside this file."""
