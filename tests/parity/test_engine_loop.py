"""Runs through the engine: the same numbers as the generic path, the same promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from thriftune.engine.layer import Keep, Layer
from thriftune.engine.path import EnginePath
from thriftune.engine.program import Program
from thriftune.errors import DoesNotFitError, NonFiniteLossError
from thriftune.methods import METHODS
from thriftune.run import prepare_run
from thriftune.target import find_target, open_target
from tiny import losses_of, metrics_of, numbers_of, record_of, tiny_model, tiny_recipe, tiny_rows, train_tiny

CPU = torch.device("cpu")
SMOOTH = {"adam_epsilon": 1e-3}  # keeps noise from becoming a step, as in test_loop.py


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "rows.jsonl", 22)


@pytest.fixture(scope="module")
def eval_rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "eval.jsonl", 9, seed=5)


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_is_that_of_the_generic_path(model, rows, eval_rows, tmp_path, method):
    changes: dict[str, Any] = {
        "method": method,
        "train": {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 4, **SMOOTH},
        "data": {"eval_path": str(eval_rows)},
    }
    for engine in ("auto", "off"):
        train_tiny(tiny_recipe(model, rows, tmp_path / engine, engine=engine, **changes))
    ours, generic = metrics_of(tmp_path / "auto"), metrics_of(tmp_path / "off")
    assert (record_of(tmp_path / "auto").path, record_of(tmp_path / "off").path) == ("engine", "generic")
    assert "the recipe says engine: off" in record_of(tmp_path / "off").path_reason
    assert generic[0].loss - generic[-1].loss > 0.5, "the run must learn for the comparison to say much"
    tolerance = 1e-5 if method == "lora" else 1e-4  # bitsandbytes' own 4-bit product on a CPU rounds differently
    for mine, theirs in zip(ours, generic, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=tolerance)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=10 * tolerance)
        assert (mine.targets, mine.tokens, mine.learning_rate) == (theirs.targets, theirs.tokens, theirs.learning_rate)
        assert (mine.eval_loss is None) == (theirs.eval_loss is None)
        if mine.eval_loss is not None:
            assert mine.eval_loss == pytest.approx(theirs.eval_loss, abs=tolerance)
    wanted = adapter_of(tmp_path / "off")
    assert adapter_of(tmp_path / "auto").keys() == wanted.keys()
    for name, tensor in adapter_of(tmp_path / "auto").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=30 * tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resuming_changes_no_bit(model, rows, tmp_path, dropout):
    changes: dict[str, Any] = {
        "engine": "auto",
        "lora": {"dropout": dropout},
        "train": {"save_strategy": "steps", "save_steps": 3},
    }
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", **changes))
    train_tiny(tiny_recipe(model, rows, tmp_path / "two", **{**changes, "train": {**changes["train"]}}))
    for name in ("adapter", "record.json", "checkpoint-6"):
        target = tmp_path / "two" / name
        target.unlink() if target.is_file() else _remove(target)
    again = {**changes, "train": {**changes["train"], "resume_from_checkpoint": "auto"}}
    resumed = tiny_recipe(model, rows, tmp_path / "two", **again)
    record = train_tiny(resumed)
    assert any("at step 3" in event for event in record.events)
    assert numbers_of(tmp_path / "two") == numbers_of(tmp_path / "whole")
    for name, tensor in adapter_of(tmp_path / "whole").items():
        assert torch.equal(adapter_of(tmp_path / "two")[name], tensor), name


def _remove(folder: Path) -> None:
    for part in sorted(folder.rglob("*"), reverse=True):
        part.unlink() if part.is_file() else part.rmdir()
    folder.rmdir()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_out_of_memory_keeps_less_then_cuts_the_step_and_ends_where_it_would_have(
    model, rows, tmp_path, monkeypatch, dropout
):
    changes: dict[str, Any] = {"engine": "auto", "lora": {"dropout": dropout}}
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", **changes, train=SMOOTH))
    add_gradients, asked = Program.add_gradients, []

    def full_above(self: Program, batch: Any, scale: float, keep: Any, *rest: Any) -> Any:
        asked.append((keep[0], batch.segments.tokens))
        if keep[0] < Keep.INPUT or batch.segments.tokens > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return add_gradients(self, batch, scale, keep, *rest)

    monkeypatch.setattr(Program, "add_gradients", full_above)
    automatic = {"gradient_checkpointing": "auto", **SMOOTH}
    record = train_tiny(tiny_recipe(model, rows, tmp_path / "parts", **changes, train=automatic))
    assert [keep for keep, _ in asked[:4]] == [Keep.ALL, Keep.NO_MLP, Keep.RESIDUALS, Keep.INPUT]
    told = [event for event in record.events if event.startswith("out of memory")]
    assert len(told) >= 4 and "tokens at once, same step, same examples" in told[3]
    for whole, parts in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts"), strict=True):
        assert parts.loss == pytest.approx(whole.loss, abs=1e-6)


def test_what_cannot_be_made_smaller_ends_honestly(model, rows, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Program, "add_gradients", full)
    automatic = {"gradient_checkpointing": "auto"}
    with pytest.raises(
        DoesNotFitError, match="one example of up to 20 tokens at once, with layers keeping their input alone, runs out"
    ):
        train_tiny(tiny_recipe(model, rows, tmp_path / "run", engine="auto", train=automatic))


def test_out_of_memory_in_an_evaluation_makes_its_parts_smaller(model, rows, eval_rows, tmp_path, monkeypatch):
    loss = Program.loss
    changes: dict[str, Any] = {
        "engine": "auto",
        "train": {"eval_strategy": "steps", "eval_steps": 3, **SMOOTH},
        "data": {"eval_path": str(eval_rows)},
    }
    whole = train_tiny(tiny_recipe(model, rows, tmp_path / "whole", **changes))

    def full_above(self: Program, batch: Any, attention: Any) -> Any:
        if batch.segments.tokens > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return loss(self, batch, attention)

    monkeypatch.setattr(Program, "loss", full_above)
    record = train_tiny(tiny_recipe(model, rows, tmp_path / "parts", **changes))
    assert any("tokens at once, same step, same examples" in event for event in record.events)
    assert record.eval_loss == pytest.approx(whole.eval_loss, abs=1e-6)


def test_a_resumed_run_keeps_4_bit_layers_unpacked_as_before(model, rows, tmp_path, monkeypatch):
    hold, held = Layer.hold, []
    monkeypatch.setattr(Layer, "hold", lambda layer: (held.append(layer), hold(layer)))
    changes = {"save_strategy": "steps", "save_steps": 3}
    train_tiny(tiny_recipe(model, rows, tmp_path / "run", engine="auto", method="qlora", train=changes))
    first = len(held)
    assert first == 2, "on a CPU all layers stay unpacked"
    _remove(tmp_path / "run" / "checkpoint-6")
    changes["resume_from_checkpoint"] = "auto"
    train_tiny(tiny_recipe(model, rows, tmp_path / "run", engine="auto", method="qlora", train=changes))
    assert len(held) == 2 * first


def test_a_loss_that_is_not_finite_stops_the_run(model, rows, tmp_path, monkeypatch):
    add_gradients = EnginePath.add_gradients
    steps = []

    def spoilt(self: EnginePath, examples: Any, targets: float) -> torch.Tensor:
        steps.append(len(examples))
        loss = add_gradients(self, examples, targets)
        return loss * float("nan") if len(steps) == 3 else loss

    monkeypatch.setattr(EnginePath, "add_gradients", spoilt)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        train_tiny(tiny_recipe(model, rows, tmp_path / "run", engine="auto"))
    assert len(losses_of(tmp_path / "run")) == 2


def test_what_the_engine_cannot_do_takes_the_generic_path_and_says_so(model, rows, tmp_path):
    said: list[str] = []

    class Listener:
        def start(self, first_step: int, num_steps: int) -> None: ...
        def step(self, metrics: Any) -> None: ...
        def event(self, text: str) -> None:
            said.append(text)

        def saved(self, folder: Path) -> None: ...
        def end(self) -> None: ...

    recipe = tiny_recipe(model, rows, tmp_path / "run", engine="auto", lora={"use_dora": True}, train={"max_steps": 1})
    record = train_tiny(recipe, [Listener()])
    assert record.path == "generic" and "a variant of LoRA" in record.path_reason
    assert said[0] == f"path: generic ({record.path_reason})"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_dropout_is_in_every_step_and_in_no_evaluation(model, rows, eval_rows, tmp_path, method):
    """Weights stand still here. The eval loss is that of the generic path and of a run without dropout, the steps'
    losses are not; evaluating more often changes none of them."""
    losses: dict[str, list[float]] = {}
    for name, every, engine, dropout in (
        ("often", 1, "auto", 0.5), ("once", 4, "auto", 0.5), ("generic", 4, "off", 0.5), ("without", 4, "auto", 0.0)
    ):  # fmt: skip
        train = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": every, "learning_rate": 1e-9}
        lora = {"dropout": dropout, "init_lora_weights": False}
        sections: dict[str, Any] = {"lora": lora, "train": train, "data": {"eval_path": str(eval_rows)}}
        record = train_tiny(tiny_recipe(model, rows, tmp_path / name, engine=engine, method=method, **sections))
        assert record.path == ("generic" if engine == "off" else "engine")
        losses[name] = [*losses_of(tmp_path / name), record.eval_loss]
    assert losses["often"] == losses["once"]
    tolerance = 1e-5 if method == "lora" else 1e-3
    assert losses["once"][-1] == pytest.approx(losses["generic"][-1], abs=tolerance)
    assert losses["once"][-1] == pytest.approx(losses["without"][-1], abs=1e-6)
    assert all(abs(mine - theirs) > 1e-3 for mine, theirs in zip(losses["once"][:-1], losses["without"], strict=False))


def test_the_adapter_written_is_the_one_trained(model, rows, tmp_path):
    """The exported adapter over a freshly loaded base has the loss that the run ended with."""
    data = {"eval_path": str(rows)}
    train = {"eval_strategy": "steps", "eval_steps": 6}
    record = train_tiny(tiny_recipe(model, rows, tmp_path / "run", engine="auto", data=data, train=train))
    opened = open_target(find_target(str(tmp_path / "run")), CPU)
    examples = prepare_run(tiny_recipe(model, rows, tmp_path / "other", data=data)).data.eval
    total = count = 0.0
    for example in examples:
        tokens = torch.from_numpy(example.tokens).long()[None]
        logits = opened.model(input_ids=tokens).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        trained = torch.from_numpy(example.trained[1:])
        total, count = total + float(losses[trained].sum()), count + int(trained.sum())
    assert record.eval_loss == pytest.approx(total / count, abs=1e-5)
    assert METHODS["lora"].result_folder == "adapter"
