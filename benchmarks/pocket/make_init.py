"""The pocket model before any training: a Llama with random weights, in float32, beside its tokenizer.

    python benchmarks/pocket/make_init.py --out runs/pocket/init

The folder must hold the files of make_tokenizer.py already. The same seed gives the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SEED = 0
# Every width is a multiple of 64, the block of NF4. Four layers rather than more and narrower ones: on a CPU the time
# goes to the number of small products, and the demo runs there.
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 640
NUM_LAYERS = 4
NUM_HEADS = 8
NUM_KEY_VALUE_HEADS = 2
POSITIONS = 1024


def build(tokenizer_folder: Path) -> LlamaForCausalLM:
    """The model for this tokenizer: tied embeddings, grouped key-value heads of 32, rotary positions."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        head_dim=HIDDEN_SIZE // NUM_HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = build(arguments.out)
    model.save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
