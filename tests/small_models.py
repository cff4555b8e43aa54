"""Small random causal language models of several families, written to folders as any model comes: the tests' downloads.

Nothing here is random twice: the same arguments give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320  # rows of the embedding; the tokenizer below has fewer ids
SPECIAL_TOKENS = ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>")
POSITIONS = 256
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "phi3")


def config_of(family: str, *, tied: bool = False) -> Any:
    """A transformers configuration with 2 layers of 64; linears are multiples of 32 wide, as 4-bit kernels ask."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.12,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if family == "gpt2":
        return hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=64, n_layer=2, n_head=4, initializer_range=0.12,
            bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
    kinds = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config, "mistral": hf.MistralConfig,
             "phi3": hf.Phi3Config}  # fmt: skip
    if family == "qwen3":
        common["head_dim"] = 16
    return kinds[family](**common)


def make_tokenizer() -> Any:
    """Bytes as tokens behind four special ones: knows every text, needs no training."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=POSITIONS
    )


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a model with its tokenizer into `folder` and return it. `changes` go into the configuration."""
    from transformers import AutoModelForCausalLM

    config = config_of(family, tied=tied)
    for name, value in changes.items():
        setattr(config, name, value)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
