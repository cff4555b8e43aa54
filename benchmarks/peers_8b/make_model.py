"""A random model at Llama-3-8B's shapes with a word-level tokenizer, and rows of given lengths, for speed and memory.

    python benchmarks/peers_8b/make_model.py --output /tmp/bench/8b --lengths ../shared/bench/gsm8k_lengths.txt \
        --rows 160 --data /tmp/bench/rows.jsonl

Speed and memory do not depend on the weights' values. The tokenizer has one word a token id, so a row of n words has n
tokens; the end token makes it n + 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128_256
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SPECIAL = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", type=Path, required=True, help="one row's number of tokens a line")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    make_model(arguments.shape, arguments.output)
    make_rows(arguments.lengths, arguments.rows, arguments.data)


def make_model(shape: str, output: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
        **SHAPES[shape],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    model.save_pretrained(output, max_shard_size="4GB")
    words = {**SPECIAL, **{f"t{number}": number for number in range(len(SPECIAL), VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=8192,
    ).save_pretrained(output)


def make_rows(lengths_file: Path, rows: int, output: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [int(line) for line in lengths_file.read_text().split()]
    order = torch.randperm(max(rows, len(lengths)), generator=generator)[:rows].tolist()
    with output.open("w", encoding="utf-8") as file:
        for place in order:
            length = lengths[place % len(lengths)] - 1
            ids = torch.randint(4, 128_000, (length,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(f"t{number}" for number in ids)}) + "\n")


if __name__ == "__main__":
    main()
