"""Whole runs whose layers are streamed, from files to adapter: the numbers of the run that holds all layers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from thriftune import run
from thriftune.engine import by_layer, hosted, shelf, streamed_path
from thriftune.engine.offload import Offload
from thriftune.errors import DoesNotFitError, InputError, ModelError, RecipeError
from thriftune.models.store import Store, cache_folder
from thriftune.run import prepare_run
from thriftune.train.checkpoint import find_checkpoint
from tiny import Watcher, losses_of, metrics_of, numbers_of, record_of, tiny_model, tiny_recipe, tiny_rows, train_tiny

LAYERS = {"num_hidden_layers": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", **LAYERS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "rows.jsonl", 22)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe_of(model: Path, rows: Path, output: Path, resident: int | None = 2, **sections: Any) -> Any:
    offload: Any = "auto" if resident is None else {"resident_layers": resident}
    sections["train"] = {"gradient_checkpointing": "on", **sections.get("train", {})}
    return tiny_recipe(model, rows, output, method="qlora", engine="auto", offload=offload, **sections)


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("resident", "dropout"), [(0, 0.0), (2, 0.0), (5, 0.0), (0, 0.1), (2, 0.1)])
def test_a_streamed_run_is_the_resident_one_bit_for_bit(model, rows, tmp_path, resident, dropout) -> None:
    """Both keep layers' inputs alone; evaluation goes through the streamed program too."""
    eval_rows = tiny_rows(tmp_path / "eval.jsonl", 9, seed=5)
    sections: dict[str, Any] = {
        "train": {"gradient_checkpointing": "on", "eval_strategy": "steps", "eval_steps": 3},
        "data": {"eval_path": str(eval_rows)},
        "lora": {"dropout": dropout},
    }
    train_tiny(recipe_of(model, rows, tmp_path / "whole", None, **sections))
    record = train_tiny(recipe_of(model, rows, tmp_path / "streamed", resident, **sections))
    assert record.path == "engine" and f"{resident} of 5 layers stay" in record.path_reason
    assert record.total_parameters == record_of(tmp_path / "whole").total_parameters
    whole, streamed = numbers_of(tmp_path / "whole"), numbers_of(tmp_path / "streamed")
    assert len(whole) == 6 and whole[0]["loss"] - whole[-1]["loss"] > 0.05
    assert whole[2]["eval_loss"] is not None
    for mine, theirs in zip(streamed, whole, strict=True):
        assert mine["loss"] == theirs["loss"] and mine["grad_norm"] == theirs["grad_norm"]
        assert mine["eval_loss"] == theirs["eval_loss"]
    for name, tensor in adapter_of(tmp_path / "whole").items():
        assert torch.equal(adapter_of(tmp_path / "streamed")[name], tensor), name
    assert all(metrics.copy_s is not None for metrics in metrics_of(tmp_path / "streamed"))
    told = record.offload
    assert told is not None and (told.resident_layers, told.layers) == (resident, 5)
    slabs = Store.of(model, 5, record.recipe.quant, torch.float32, torch.device("cpu")).layouts
    assert told.host_bytes == sum(layout.bytes for layout in slabs[resident:])
    assert told.compute_s + told.waited_s == pytest.approx(told.step_s, rel=0.01)
    if resident == 0:  # each layer twice a step, but the two that turn and the two that the next step finds
        assert told.copied_bytes_per_step == slabs[0].bytes * (2 * 5 - 4)
    assert record_of(tmp_path / "whole").offload is None


def test_a_run_that_is_over_has_let_go_of_the_hosts_memory(model, rows, tmp_path, monkeypatch) -> None:
    """Or what follows in the same process (a comparison's scores, streamed too) would pin as much again."""
    made: list[Any] = []
    for module in (hosted, shelf):
        pin = module.pinned_block
        monkeypatch.setattr(module, "pinned_block", lambda *words, pin=pin: made.append(pin(*words)) or made[-1])
    recipe, watcher = recipe_of(model, rows, tmp_path / "run", 0, train={"max_steps": 2}), Watcher()
    slab = Store.of(model, 5, recipe.quant, torch.float32, torch.device("cpu")).layouts[0].bytes
    monkeypatch.setattr(hosted, "available_bytes", lambda: hosted.LEFT_FOR_THE_SYSTEM + (1 + hosted.STAGED) * slab)
    monkeypatch.setattr(streamed_path, "choose_offload", lambda *_: Offload(0, 5, True, 128))
    before = threading.active_count()
    record = train_tiny(recipe, [watcher])
    assert any("4 are read from the disk" in event for event in watcher.events)
    assert record.offload is not None and record.offload.host_bytes > 0 and record.offload.inputs_on_host
    assert len(made) > 4 and all(block.bytes.numel() == 0 for block in made)
    assert threading.active_count() == before, "the disk's reader goes on reading"


def test_the_record_is_written_before_memory_is_let_go(model, rows, tmp_path, monkeypatch) -> None:
    """A device that has failed refuses to let go, and a disk may keep its reader; the run is done all the same."""

    def fail(path: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(streamed_path.StreamedPath, "close", fail)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        train_tiny(recipe_of(model, rows, tmp_path / "run", 0, train={"max_steps": 1}))
    assert record_of(tmp_path / "run").status == "done"


@pytest.mark.parametrize("place", ["train", "export_result", "_leave_behind"])
def test_memory_is_let_go_whatever_ends_a_run(model, rows, tmp_path, monkeypatch, place) -> None:
    closed: list[Any] = []

    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(streamed_path.StreamedPath, "close", lambda path: closed.append(path))
    monkeypatch.setattr(run, place, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train_tiny(recipe_of(model, rows, tmp_path / "run", 0, train={"max_steps": 1}))
    assert len(closed) == 1


def test_the_second_start_quantises_nothing(model, rows, tmp_path, monkeypatch) -> None:
    first, second = Watcher(), Watcher()
    train_tiny(recipe_of(model, rows, tmp_path / "first", train={"max_steps": 1}), [first])
    monkeypatch.setattr(Store, "_quantised", lambda *_: pytest.fail("a layer was quantised again"))
    train_tiny(recipe_of(model, rows, tmp_path / "second", train={"max_steps": 1}), [second])
    assert any(text.startswith("quantising: layer 5 of 5") for text in first.events)
    assert not any("quantising" in text for text in second.events)
    assert losses_of(tmp_path / "first") == losses_of(tmp_path / "second")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resuming_changes_no_bit(model, rows, tmp_path, dropout) -> None:
    saving, lora = {"save_strategy": "steps", "save_steps": 3}, {"dropout": dropout}
    train_tiny(recipe_of(model, rows, tmp_path / "whole", train=saving, lora=lora))

    def stop(metrics: Any) -> None:
        if metrics.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(BaseException, match="SIGINT"):
        train_tiny(recipe_of(model, rows, tmp_path / "two", train=saving, lora=lora), [Watcher(stop)])
    resumed = {**saving, "resume_from_checkpoint": "auto"}
    train_tiny(recipe_of(model, rows, tmp_path / "two", 0, train=resumed, lora=lora))  # fewer layers stay than before
    assert numbers_of(tmp_path / "two") == numbers_of(tmp_path / "whole")
    for name, tensor in adapter_of(tmp_path / "whole").items():
        assert torch.equal(adapter_of(tmp_path / "two")[name], tensor), name


def test_killed_while_quantising_and_while_training_and_nothing_is_lost(model, rows, tmp_path) -> None:
    """SIGKILL, which nobody can catch: once when a layer is in the cache, once when a checkpoint is written. With
    dropout on, whose masks have no state to lose."""
    train = {"max_steps": 40, "save_steps": 2}
    train_tiny(recipe_of(model, rows, tmp_path / "whole", train=train, lora={"dropout": 0.1}))
    folder = next(cache_folder().iterdir())
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    words = ["train", str(model), "--data", str(rows), "--method", "qlora", "--output", str(tmp_path / "two"),
             "offload={resident_layers: 2}", "max_steps=40", "save_steps=2", "seed=7", "lora_r=4", "lora_alpha=8",
             "lora_dropout=0.1", "learning_rate=1e-2", "warmup_ratio=0", "max_length=128",
             "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "gradient_checkpointing=on",
             "resume_from_checkpoint=auto"]  # fmt: skip
    command = [sys.executable, "-m", "thriftune", *words]

    def killed_when(seen: Any) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not seen() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    killed_when(lambda: any(folder.glob("layer-*.slab")))
    killed_when(lambda: find_checkpoint(tmp_path / "two", "auto", print) if (tmp_path / "two").exists() else None)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any("resumed from" in event for event in record_of(tmp_path / "two").events)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert losses_of(tmp_path / "two") == losses_of(tmp_path / "whole")


def test_out_of_memory_streams_more_then_cuts_parts_and_ends_where_it_would_have(
    model, rows, tmp_path, monkeypatch
) -> None:
    train_tiny(recipe_of(model, rows, tmp_path / "whole"))
    add_gradients, asked = by_layer.add_gradients, []

    def full_above(program: Any, streaming: Any, shelf: Any, parts: Any, *rest: Any) -> Any:
        most = max(part.segments.tokens for part in parts)
        asked.append((len(streaming.resident), most))
        if streaming.resident or most > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return add_gradients(program, streaming, shelf, parts, *rest)

    monkeypatch.setattr(by_layer, "add_gradients", full_above)
    record = train_tiny(recipe_of(model, rows, tmp_path / "parts"))
    assert [resident for resident, _ in asked[:3]] == [2, 1, 0]
    told = [event for event in record.events if event.startswith("out of memory")]
    assert "1 layers more are streamed" in told[0] and "tokens at once" in told[2]
    for whole, parts in zip(losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts"), strict=True):
        assert parts == pytest.approx(whole, abs=1e-6)


def test_what_cannot_be_made_smaller_ends_honestly(model, rows, tmp_path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(by_layer, "add_gradients", full)
    with pytest.raises(DoesNotFitError, match="0 of 5 layers stay on the GPU, 5 are streamed"):
        train_tiny(recipe_of(model, rows, tmp_path / "run"))


@pytest.mark.parametrize("place", ["load_shell", "Store.make"])
def test_what_does_not_fit_before_the_first_step_ends_honestly(model, rows, tmp_path, monkeypatch, place) -> None:
    """A model that did not fit was loaded with streamed layers, and what is left of it did not fit either."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(f"thriftune.run_path.{place}", full)
    with pytest.raises(DoesNotFitError, match=r"no memory is left for the head, .*: CUDA out of memory") as caught:
        train_tiny(recipe_of(model, rows, tmp_path / "run"))
    assert "max_memory" in caught.value.do and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- refusals


def test_options_that_contradict_streaming_are_refused(model, rows, tmp_path) -> None:
    with pytest.raises(RecipeError, match="method is lora"):
        tiny_recipe(model, rows, tmp_path / "run", method="lora", engine="auto", offload={"resident_layers": 1})
    with pytest.raises(RecipeError, match="engine is off"):
        tiny_recipe(model, rows, tmp_path / "run", method="qlora", engine="off", offload={"resident_layers": 1})
    with pytest.raises(RecipeError, match="gradient_checkpointing is off"):
        recipe_of(model, rows, tmp_path / "run", train={"gradient_checkpointing": "off"})
    for wrong in ("on", {"layers": 3}, {"resident_layers": -1}, {"resident_layers": True}, {}):
        with pytest.raises(RecipeError, match=r"auto, off or \{resident_layers: N\}"):
            tiny_recipe(model, rows, tmp_path / "run", method="qlora", engine="auto", offload=wrong)
    with pytest.raises(RecipeError, match="expects a size above 0 with its unit"):
        tiny_recipe(model, rows, tmp_path / "run", max_memory="lots")


def test_what_the_engine_does_not_take_cannot_be_streamed(model, rows, tmp_path) -> None:
    recipe = recipe_of(model, rows, tmp_path / "run", lora={"use_dora": True})
    with pytest.raises(ModelError, match="layers are to be streamed, and the engine does not take this run: a variant"):
        train_tiny(recipe)
    assert not (tmp_path / "run").exists()
    gemma = tiny_model(tmp_path / "gemma", **LAYERS)
    config = json.loads((gemma / "config.json").read_text())
    (gemma / "config.json").write_text(json.dumps(config | {"model_type": "gemma", "head_dim": 16}))
    with pytest.raises(ModelError, match="it knows llama, mistral, qwen2, qwen3, and this model is of type gemma"):
        train_tiny(recipe_of(gemma, rows, tmp_path / "run"))
    assert not cache_folder().exists(), "nothing is quantised that cannot be trained"


def test_weights_of_other_sizes_than_the_configs_are_refused(model, rows, tmp_path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(ModelError, match="gate_proj of layer 0 is 128 x 64 in the model's files, and 192 x 64 by its"):
        train_tiny(recipe_of(other, rows, tmp_path / "run"))


def test_a_memory_cap_on_a_cpu_is_refused(model, rows, tmp_path) -> None:
    with pytest.raises(InputError, match="max_memory=24GiB on cpu"):
        train_tiny(recipe_of(model, rows, tmp_path / "run", max_memory="24GiB"))


def test_the_plan_says_what_stays_and_what_streams(model, rows, tmp_path) -> None:
    prepared = prepare_run(recipe_of(model, rows, tmp_path / "run"))
    assert prepared.planned.streams
    settings = prepared.planned.chosen.settings
    assert (settings["layers_resident"], settings["layers_streamed"]) == (2, 3)
    assert "2 of 5 layers stay" in prepared.planned.lines()[2]
    assert not prepare_run(recipe_of(model, rows, tmp_path / "run", None)).planned.streams
