"""A tiny random Llama with a tokenizer, rows to train it on, and a run over both by the ordinary path.

Two layers, hidden 64, all matrices multiples of 64 wide so that they can be held in 4 bits too. Nothing is downloaded;
building the folder takes a fraction of a second.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from thriftune.recipe import Recipe
from thriftune.records import RunRecord, StepMetrics, read_record
from thriftune.run import Prepared, prepare_run, run
from thriftune.train.observe import Observer, read_metrics

VOCABULARY = 320
WORDS = ["the", "film", "plot", "actor", "scene", "music", "was", "is", "felt", "very", "never", "good", "bad", "dull"]
# What a resumed or repeated run may differ in.
MEASURED = {"step_s", "tokens_per_s", "memory_bytes", "peak_bytes", "energy_j"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most VOCABULARY tokens, <s> never written by itself, </s> at the end of an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A whole model in `folder`: config.json, safetensors and tokenizer. The same seed gives the same weights."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype)
    model.save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def tiny_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """`count` prompt/completion rows of different lengths, all distinct."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{number}: {' '.join(draw.choices(WORDS, k=draw.randint(2, 9)))}?"
            completion = "".join(f" {word}" for word in draw.choices(WORDS, k=draw.randint(1, 6)))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


def tiny_recipe(model: Path, rows: Path, output: Path, *, method: str = "lora", **sections: Any) -> Recipe:
    """A recipe of six steps of four rows, no warm-up, a rate that moves the loss. `train={...}` and so on override.

    Without the engine, unless `engine="auto"`: most tests of the loop look into the model's own forward pass.
    """
    tree: dict[str, Any] = {
        "method": method,
        "engine": "off",
        "model": {"name": str(model)},
        "data": {"name": str(rows), "max_length": 128},
        "train": {
            "learning_rate": 3e-3 if method == "full" else 1e-2,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "warmup_ratio": 0.0,
            "save_strategy": "no",
            "eval_strategy": "no",
            "gradient_checkpointing": "off",
        },
        "lora": {"r": 4, "alpha": 8.0} if method != "full" else {},
        "output": str(output),
        "seed": 7,
    }
    if method == "dynamic":
        tree |= {"lora": {"alpha": 8.0}, "dynamic": {"r_start": 8, "round_to": 2, "first_cut": 0.2, "n_cuts": 2}}
    for name, value in sections.items():
        tree[name] = {**tree[name], **value} if isinstance(tree.get(name), dict) else value
    return Recipe.build(tree, source="the test's recipe")


def train_tiny(recipe: Recipe, observers: Sequence[Observer] = (), prepared: Prepared | None = None) -> RunRecord:
    """The run as the command line does it, in this process."""
    return run(
        prepared or prepare_run(recipe),
        observers=observers,
        command="thriftune train",
        resume_command="GO ON WITH THIS",
    )


def metrics_of(output: Path) -> list[StepMetrics]:
    return read_metrics(output / "metrics.jsonl")


def numbers_of(output: Path) -> list[dict[str, Any]]:
    """Every number of metrics.jsonl that does not measure time or memory: equal for equal runs, bit for bit."""
    return [metrics.model_dump(exclude=MEASURED) for metrics in metrics_of(output)]


def losses_of(output: Path) -> list[float]:
    return [metrics.loss for metrics in metrics_of(output)]


def record_of(output: Path) -> RunRecord:
    return read_record(output / "record.json", RunRecord)


class Watcher:
    """An observer that keeps what it is told, and calls `at_step(metrics)` after each step."""

    def __init__(self, at_step: Any = None) -> None:
        self.steps: list[StepMetrics] = []
        self.events: list[str] = []
        self.folders: list[Path] = []
        self.ended = 0
        self._at_step = at_step

    def start(self, first_step: int, num_steps: int) -> None:
        self.first_step, self.num_steps = first_step, num_steps

    def step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        if self._at_step is not None:
            self._at_step(metrics)

    def event(self, text: str) -> None:
        self.events.append(text)

    def saved(self, folder: Path) -> None:
        self.folders.append(folder)

    def end(self) -> None:
        self.ended += 1


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A disk of its own of that size, mounted on `folder`; the test is skipped where that is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("mounting a small disk needs Linux' mount")
    if done.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
