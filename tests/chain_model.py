"""A transformers model that says what a test wants, and a tokenizer for any text; both built in a moment."""

from __future__ import annotations

import itertools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer(words: tuple[str, ...] = (), template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for each byte, for each of `words`, and the special ones, ids 0 to 3: end, pad, user, assistant."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.add_tokens(list(words))
    fast.chat_template = template
    return fast


def chain_model(tokenizer: PreTrainedTokenizerFast, chain: dict[int, int], positions: int = 4096) -> LlamaForCausalLM:
    """A Llama whose layers add nothing: after token a, `chain[a]` has a logit of 20 and all others have 0."""
    size = -(-len(tokenizer) // 4) * 4
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for before, after in chain.items():
            model.lm_head.weight[after, before] = 20 / size**0.5
    return model


def says(tokenizer: PreTrainedTokenizerFast, text: str, end: bool = True) -> dict[int, int]:
    """The chain that answers every prompt of the template with `text`, whose tokens must all differ."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids)
    path = [3, *ids, *([0] if end else [])]
    return dict(itertools.pairwise(path))
