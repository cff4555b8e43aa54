"""Asking a model: many prompts at once, one as a stream, the likelihood of given answers, files of rows, a chat."""
