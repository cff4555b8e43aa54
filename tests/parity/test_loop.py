"""The loop on a tiny model, by the ordinary path from recipe to record: against TRL, however a step is cut, out of
memory, evaluated in between, with numbers that are not finite, on a full disk."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from thriftune.cli import main
from thriftune.data import prepare
from thriftune.errors import (
    CheckpointError,
    DiskFullError,
    DoesNotFitError,
    InputError,
    NonFiniteLossError,
    OutputError,
)
from thriftune.methods import METHODS
from thriftune.models import load_model
from thriftune.records import DataAudit
from thriftune.run import prepare_run
from thriftune.train.checkpoint import find_checkpoint, verify_checkpoint
from tiny import (
    Watcher,
    losses_of,
    metrics_of,
    numbers_of,
    record_of,
    small_disk,
    tiny_model,
    tiny_recipe,
    tiny_rows,
    train_tiny,
)

CPU = torch.device("cpu")
# AdamW divides a gradient by its own size; an epsilon well above rounding keeps noise from becoming a step.
SMOOTH = {"adam_epsilon": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Recovering collects garbage. What the libraries' import left need not be searched every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "rows.jsonl", 22)


@pytest.fixture
def change_model(monkeypatch) -> Callable[[Callable[[nn.Module], None]], None]:
    """`change_model(change)`: every model that a run loads from here on goes through `change` first."""

    def install(change: Callable[[nn.Module], None]) -> None:
        def changed(*arguments, **named):
            loaded = load_model(*arguments, **named)
            change(loaded.model)
            return loaded

        monkeypatch.setattr("thriftune.run_path.load_model", changed)

    return install


def trained_tensors(output: Path, method: str = "lora") -> dict[str, torch.Tensor]:
    if method == "full":
        return load_file(output / "model" / "model.safetensors")
    return load_file(output / "adapter" / "adapter_model.safetensors")


def largest_difference(one: list[float], two: list[float]) -> float:
    assert len(one) == len(two) > 0
    return max(abs(first - second) for first, second in zip(one, two, strict=True))


def assert_same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == two.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=tolerance)


# -- against TRL ------------------------------------------------------------------------------------------------------


def losses_of_trl(method: str, recipe, rows: Path, output: Path) -> tuple[list[dict], list[list[int]]]:
    """TRL's log of the same run from the same weights over the same rows in their order; and the tokens it trained."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = recipe.train
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=0,
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=recipe.data.max_length,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = recipe.lora
    adapter = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(recipe.model.name),
        args=arguments,
        train_dataset=Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
        processing_class=AutoTokenizer.from_pretrained(recipe.model.name),
        peft_config=adapter if method == "lora" else None,
    )
    if method == "lora":
        loaded = load_model(recipe.model, device=CPU, dtype=torch.float32, quant=None)
        start = METHODS["lora"].attach(loaded, recipe)
        theirs = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        ours = {name: parameter for name, parameter in start.named_parameters() if parameter.requires_grad}
        assert theirs.keys() == ours.keys()
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(ours[name])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], trainer.train_dataset["input_ids"]


@pytest.mark.parametrize(("method", "engine"), [("lora", "off"), ("lora", "auto"), ("full", "off")])
def test_twenty_steps_equal_those_of_trl(model, rows, tmp_path, method, engine):
    """22 rows at four a step: every sixth step has two rows only. Measured: losses differ by at most 5e-7."""
    train = {"max_steps": 20, "lr_scheduler_type": "cosine"}
    data = {"shuffle": False}
    recipe = tiny_recipe(model, rows, tmp_path / "run", method=method, engine=engine, train=train, data=data)
    prepared = prepare_run(recipe)
    record = train_tiny(recipe, prepared=prepared)
    assert record.path == ("engine" if engine == "auto" else "generic")
    ours = metrics_of(tmp_path / "run")
    theirs, their_tokens = losses_of_trl(method, recipe, rows, tmp_path / "trl")
    assert [example.tokens.tolist() for example in prepared.data.train] == list(their_tokens)
    assert len(ours) == 20 and ours[0].loss - ours[-1].loss > 1, "the run must learn for the comparison to say much"
    assert largest_difference([step.loss for step in ours], [step["loss"] for step in theirs]) < 1e-5
    assert largest_difference([step.grad_norm for step in ours], [step["grad_norm"] for step in theirs]) < 1e-4
    assert [step.learning_rate for step in ours] == [step["learning_rate"] for step in theirs]
    assert [step.epoch for step in ours] == pytest.approx([step["epoch"] for step in theirs], abs=1e-12)
    assert [step.tokens_seen for step in ours] == [step["num_tokens"] for step in theirs]


# -- however a step is cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_the_same_in_one_two_or_eight_micro_batches(model, rows, tmp_path, method):
    """Also other padding: rows of different lengths meet in other micro-batches."""
    for at_once in (8, 4, 1):
        train = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": 8 // at_once, "max_steps": 8}
        if method == "full":
            train["learning_rate"] = 2e-4
        recipe = tiny_recipe(model, rows, tmp_path / str(at_once), method=method, train={**train, **SMOOTH})
        train_tiny(recipe)
    whole = metrics_of(tmp_path / "8")
    assert len({step.targets for step in whole}) > 1, "the test needs steps of different numbers of targets"
    for at_once in ("4", "1"):
        parts = metrics_of(tmp_path / at_once)
        assert largest_difference([step.loss for step in whole], [step.loss for step in parts]) < 1e-6
        assert largest_difference([step.grad_norm for step in whole], [step.grad_norm for step in parts]) < 1e-5
        assert [(s.targets, s.tokens, s.epoch) for s in whole] == [(s.targets, s.tokens, s.epoch) for s in parts]
        assert_same_tensors(
            trained_tensors(tmp_path / "8", method), trained_tensors(tmp_path / at_once, method), tolerance=1e-6
        )


def test_recomputing_activations_changes_no_loss(model, rows, tmp_path):
    for switch in ("off", "on"):
        train_tiny(
            tiny_recipe(model, rows, tmp_path / switch, train={"gradient_checkpointing": switch}, lora={"dropout": 0.2})
        )
    assert losses_of(tmp_path / "on") == losses_of(tmp_path / "off")
    assert_same_tensors(trained_tensors(tmp_path / "on"), trained_tensors(tmp_path / "off"))


def test_the_numbers_of_every_step_are_what_they_say(model, rows, tmp_path):
    recipe = tiny_recipe(model, rows, tmp_path, train={"max_steps": 7}, data={"shuffle": False})
    prepared = prepare_run(recipe)
    watcher = Watcher()
    record = train_tiny(recipe, [watcher], prepared)
    found = metrics_of(tmp_path)
    assert found == watcher.steps
    seen = 0
    for number, step in enumerate(found):
        start = number % 6 * 4
        examples = prepared.data.train[start : start + 4]
        seen += sum(map(len, examples))
        assert step.step == number + 1
        assert step.targets == sum(int(example.trained[1:].sum()) for example in examples)
        assert (step.tokens, step.tokens_seen) == (sum(map(len, examples)), seen)
        assert step.epoch == pytest.approx([4, 8, 12, 16, 20, 22, 26][number] / 22)
        assert step.learning_rate == pytest.approx(1e-2 * (1 - number / 7))
        assert step.events == [] and step.eval_loss is None and step.energy_j is None
        assert step.tokens_per_s == pytest.approx(step.tokens / step.step_s)
        assert 0 < step.memory_bytes <= step.peak_bytes * 2
    assert (watcher.first_step, watcher.num_steps, watcher.ended) == (0, 7, 1)
    assert (record.status, record.steps, record.tokens, record.loss) == ("done", 7, seen, found[-1].loss)
    assert record.epochs == found[-1].epoch
    assert record_of(tmp_path) == record
    assert isinstance(record.data, DataAudit)


def test_the_records_loss_is_the_mean_over_the_targets_of_the_last_tenth(model, rows, tmp_path):
    record = train_tiny(tiny_recipe(model, rows, tmp_path, train={"max_steps": 25}))
    last = metrics_of(tmp_path)[-2:]
    assert last[0].targets != last[1].targets
    assert record.loss == pytest.approx(
        sum(step.loss * step.targets for step in last) / sum(step.targets for step in last), rel=1e-12
    )


def test_the_same_seed_gives_the_same_run_and_another_one_another(model, rows, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train_tiny(tiny_recipe(model, rows, tmp_path / name, lora={"dropout": 0.1}, seed=seed))
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b")
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")
    assert_same_tensors(trained_tensors(tmp_path / "a"), trained_tensors(tmp_path / "b"))


def test_dropout_is_another_one_in_every_step(model, rows, tmp_path):
    """The same rows in every step and weights that stand still: gradients differ by dropout only."""
    train = {"learning_rate": 1e-30, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    data = {"max_samples": 4}
    for name, dropout in (("without", 0.0), ("with", 0.3)):
        train_tiny(tiny_recipe(model, rows, tmp_path / name, train=train, data=data, lora={"dropout": dropout}))
    assert len({round(step.grad_norm, 4) for step in metrics_of(tmp_path / "without")}) == 1
    assert len({step.grad_norm for step in metrics_of(tmp_path / "with")}) == 6


def test_a_bfloat16_base_trains_a_float32_adapter_close_to_the_float32_run(model, rows, tmp_path):
    for dtype in ("float32", "bfloat16"):
        train_tiny(tiny_recipe(model, rows, tmp_path / dtype).replace(model={"dtype": dtype}))
    assert {tensor.dtype for tensor in trained_tensors(tmp_path / "bfloat16").values()} == {torch.float32}
    assert 0 < largest_difference(losses_of(tmp_path / "float32"), losses_of(tmp_path / "bfloat16")) < 0.05


# -- out of memory ----------------------------------------------------------------------------------------------------


def limit_rows(rows_that_fit: int, calls: list[int]) -> Callable[[nn.Module], None]:
    """The model runs out of memory above so many rows, in training only, as on a device."""

    def change(network: nn.Module) -> None:
        def check(module, inputs) -> None:
            if module.training:
                calls.append(inputs[0].shape[0])
                if inputs[0].shape[0] > rows_that_fit:
                    raise torch.OutOfMemoryError("CUDA out of memory (test)")

        network.get_input_embeddings().register_forward_pre_hook(check)

    return change


def full_at_call(call: int) -> Callable[[nn.Module], None]:
    """The model runs out of memory once, at its `call`-th forward pass in training."""
    calls: list[int] = []

    def change(network: nn.Module) -> None:
        def check(module, inputs) -> None:
            if module.training:
                calls.append(1)
                if len(calls) == call:
                    raise torch.OutOfMemoryError("CUDA out of memory (test)")

        network.get_input_embeddings().register_forward_pre_hook(check)

    return change


IN_ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 5, **SMOOTH}


def test_out_of_memory_repeats_the_step_in_smaller_parts_and_ends_where_it_would_have(
    model, rows, tmp_path, change_model
):
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", train=IN_ONE))
    calls: list[int] = []
    change_model(limit_rows(3, calls))
    watcher = Watcher()
    record = train_tiny(tiny_recipe(model, rows, tmp_path / "recovered", train=IN_ONE), [watcher])
    whole, recovered = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "recovered")
    assert largest_difference([step.loss for step in whole], [step.loss for step in recovered]) < 1e-6
    assert [step.targets for step in whole] == [step.targets for step in recovered]
    assert_same_tensors(trained_tensors(tmp_path / "whole"), trained_tensors(tmp_path / "recovered"), tolerance=1e-6)
    said = [
        "out of memory: 8 -> 4 rows at once, same step, same examples",
        "out of memory: 4 -> 2 rows at once, same step, same examples",
    ]
    assert (recovered[0].events, record.events, watcher.events[1:]) == (said, said, said)
    assert [step.events for step in recovered[1:]] == [[]] * 4
    assert calls[:6] == [8, 4, 2, 2, 2, 2] and max(calls[2:]) == 2, "later steps start with what fitted"


def test_what_a_failed_attempt_left_in_the_gradients_is_thrown_away(model, rows, tmp_path, change_model):
    """The memory is full at the second of four micro-batches of step 2, when the first has left its gradient."""
    train = {**IN_ONE, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", train=train))
    change_model(full_at_call(4 + 2))
    train_tiny(tiny_recipe(model, rows, tmp_path / "recovered", train=train))
    whole, recovered = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "recovered")
    assert [bool(step.events) for step in recovered] == [False, True, False, False, False]
    assert largest_difference([step.loss for step in whole], [step.loss for step in recovered]) < 1e-6
    assert largest_difference([step.grad_norm for step in whole], [step.grad_norm for step in recovered]) < 1e-5


def test_with_dropout_the_repeated_step_is_that_of_a_run_which_goes_on_in_smaller_parts(
    model, rows, tmp_path, change_model
):
    """Dropout is drawn anew for other parts of a step, so the losses are not those of the run in one part. They are,
    bit for bit, those of a run that was stopped before this step and resumed with half the rows at once."""
    dropout = {"dropout": 0.2}
    train = {**IN_ONE, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", train=train, lora=dropout))
    shutil.copytree(tmp_path / "whole", tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved" / "checkpoint-6")
    halved = {**train, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    halved["resume_from_checkpoint"] = "auto"
    train_tiny(tiny_recipe(model, rows, tmp_path / "halved", train=halved, lora=dropout))
    change_model(full_at_call(4))
    train_tiny(tiny_recipe(model, rows, tmp_path / "recovered", train=train, lora=dropout))
    assert [bool(step.events) for step in metrics_of(tmp_path / "recovered")] == [False] * 3 + [True] + [False] * 2
    assert losses_of(tmp_path / "recovered") == losses_of(tmp_path / "halved")
    assert losses_of(tmp_path / "recovered")[:3] == losses_of(tmp_path / "whole")[:3]
    assert losses_of(tmp_path / "recovered")[3:] != losses_of(tmp_path / "whole")[3:]
    assert_same_tensors(trained_tensors(tmp_path / "recovered"), trained_tensors(tmp_path / "halved"))


def test_one_row_that_does_not_fit_gets_checkpointing_and_then_an_honest_end(model, rows, tmp_path, change_model):
    def change(network: nn.Module) -> None:
        def check(module, inputs) -> None:
            if module.training and not network.is_gradient_checkpointing:
                raise torch.OutOfMemoryError("CUDA out of memory (test)")

        network.get_input_embeddings().register_forward_pre_hook(check)

    automatic = {**IN_ONE, "gradient_checkpointing": "auto"}
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", train=automatic))
    change_model(change)
    record = train_tiny(tiny_recipe(model, rows, tmp_path / "recovered", train=automatic))
    assert record.events[-1] == "out of memory at one row at once: gradient checkpointing on from here, same step"
    assert largest_difference(losses_of(tmp_path / "whole"), losses_of(tmp_path / "recovered")) < 1e-6

    change_model(limit_rows(0, []))
    with pytest.raises(DoesNotFitError, match="checkpointing on runs out of memory") as caught:
        train_tiny(tiny_recipe(model, rows, tmp_path / "full", train=automatic))
    assert caught.value.exit_code == 3
    record = record_of(tmp_path / "full")
    assert (record.status, record.steps, record.adapter) == ("failed", 0, None)
    assert record.events[-1] == caught.value.given and len(record.events) == 5
    assert not (tmp_path / "full" / "adapter").exists() and metrics_of(tmp_path / "full") == []


def test_no_memory_for_the_optimizers_state_is_an_honest_end_too(model, rows, tmp_path, monkeypatch):
    def step(self, closure=None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (test)")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(DoesNotFitError, match="optimizer's state"):
        train_tiny(tiny_recipe(model, rows, tmp_path))
    assert record_of(tmp_path).status == "failed"


# -- evaluation in between --------------------------------------------------------------------------------------------


def plain_loss(network: nn.Module, examples) -> float:
    """The definition: one row at a time, torch's own cross-entropy in float64, mean over the target tokens."""
    total, count = 0.0, 0
    network.eval()
    with torch.no_grad():
        for example in examples:
            tokens_T = torch.from_numpy(example.tokens).long()
            targets_T = tokens_T.where(torch.from_numpy(example.trained), -100)[1:]
            logits_TV = network(input_ids=tokens_T[None]).logits[0, :-1].double()
            total += float(functional.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum"))
            count += int((targets_T != -100).sum())
    return total / count


@pytest.fixture(scope="module")
def eval_rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "eval.jsonl", 9, seed=5)


def test_the_eval_loss_is_that_of_the_saved_adapter_computed_plainly(model, rows, eval_rows, tmp_path):
    data, every = {"eval_path": str(eval_rows)}, {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 6}
    recipe = tiny_recipe(model, rows, tmp_path, data=data, train=every, lora={"dropout": 0.2})
    record = train_tiny(recipe)
    evals = [step.eval_loss for step in metrics_of(tmp_path)]
    assert [value is None for value in evals] == [True, True, True, False, True, False], "step 4, and the last"
    tokenizer = AutoTokenizer.from_pretrained(model)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    assert evals[-1] == pytest.approx(plain_loss(adapted, prepare(recipe, tokenizer).eval), abs=1e-6)
    assert record.eval_loss == evals[-1]


def test_evaluation_changes_nothing_of_the_training(model, rows, eval_rows, tmp_path):
    """With dropout on: were the model left in eval mode or the random numbers used up, the losses would differ."""
    dropout = {"dropout": 0.2}
    train_tiny(tiny_recipe(model, rows, tmp_path / "without", lora=dropout))
    for rows_at_once in (8, 2):
        data, train = {"eval_path": str(eval_rows)}, {"eval_strategy": "steps", "eval_steps": 1}
        train["per_device_eval_batch_size"] = rows_at_once
        train_tiny(tiny_recipe(model, rows, tmp_path / f"eval{rows_at_once}", data=data, train=train, lora=dropout))
        assert losses_of(tmp_path / f"eval{rows_at_once}") == losses_of(tmp_path / "without")
    in_eights, in_twos = ([step.eval_loss for step in metrics_of(tmp_path / name)] for name in ("eval8", "eval2"))
    assert largest_difference(in_eights, in_twos) < 1e-6


def test_evaluation_that_runs_out_of_memory_takes_fewer_rows_and_says_so(
    model, rows, eval_rows, tmp_path, change_model
):
    def change(network: nn.Module) -> None:
        def check(module, inputs) -> None:
            if not module.training and inputs[0].shape[0] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (test)")

        network.get_input_embeddings().register_forward_pre_hook(check)

    data, train = {"eval_path": str(eval_rows)}, {"eval_strategy": "epoch"}
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", data=data, train=train))
    change_model(change)
    train_tiny(tiny_recipe(model, rows, tmp_path / "recovered", data=data, train=train))
    whole, recovered = metrics_of(tmp_path / "whole")[-1], metrics_of(tmp_path / "recovered")[-1]
    assert recovered.eval_loss == pytest.approx(whole.eval_loss, abs=1e-6)
    assert recovered.loss == whole.loss
    assert [text[:22] for text in recovered.events] == ["out of memory: 8 -> 4 ", "out of memory: 4 -> 2 "]


OVERFIT = {"learning_rate": 0.05, "max_steps": 10, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_best_step_is_kept(model, rows, eval_rows, tmp_path, method):
    """Two rows over and over make other rows worse at last; the step before that comes out of the run."""
    train = {**OVERFIT, "save_steps": 3, "save_total_limit": 1, "load_best_model_at_end": True}
    train["learning_rate"] = 0.05 if method == "lora" else 0.01
    data = {"eval_path": str(eval_rows), "max_samples": 2}
    watcher = Watcher()
    record = train_tiny(tiny_recipe(model, rows, tmp_path, method=method, data=data, train=train), [watcher])
    evals = [step.eval_loss for step in metrics_of(tmp_path)]
    best = evals.index(min(evals)) + 1
    assert 1 < best < 10, "the test needs a best step in between"
    assert (record.best_step, record.eval_loss) == (best, min(evals))
    assert record.events[-1].startswith(f"kept step {best}, whose eval loss {min(evals):.4f}")
    name = "adapter_model.safetensors" if method == "lora" else "trained.safetensors"
    saved = load_file(tmp_path / f"checkpoint-{best}" / name)
    assert_same_tensors(trained_tensors(tmp_path, method), saved)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == sorted(
        [f"checkpoint-{best}", "checkpoint-10"]
    )
    assert watcher.folders[-1] == tmp_path / "checkpoint-10"


def test_without_load_best_the_record_has_the_eval_loss_of_what_was_kept(model, rows, eval_rows, tmp_path):
    data = {"eval_path": str(eval_rows), "max_samples": 2}
    record = train_tiny(tiny_recipe(model, rows, tmp_path, data=data, train={**OVERFIT, "save_steps": 3}))
    evals = [step.eval_loss for step in metrics_of(tmp_path)]
    assert record.eval_loss == evals[-1] > min(evals)
    assert record.best_step == evals.index(min(evals)) + 1
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]


def test_a_best_checkpoint_that_is_damaged_at_the_end_is_not_handed_out(model, rows, eval_rows, tmp_path):
    train = {**OVERFIT, "save_steps": 99, "load_best_model_at_end": True}
    data = {"eval_path": str(eval_rows), "max_samples": 2}

    def damage(metrics) -> None:
        for path in tmp_path.glob("checkpoint-*/adapter_model.safetensors") if metrics.step == 10 else []:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    with pytest.raises(CheckpointError, match="best step cannot be kept") as caught:
        train_tiny(tiny_recipe(model, rows, tmp_path, data=data, train=train), [Watcher(damage)])
    assert "load_best_model_at_end=false" in caught.value.do
    assert record_of(tmp_path).status == "failed"
    again = {**train, "load_best_model_at_end": False, "resume_from_checkpoint": "auto"}
    assert train_tiny(tiny_recipe(model, rows, tmp_path, data=data, train=again)).status == "done"


def test_an_eval_loss_that_is_no_number_is_told_and_never_the_best(model, rows, eval_rows, tmp_path, change_model):
    evaluations: list[int] = []

    def change(network: nn.Module) -> None:
        def spoil(module, inputs, output):
            if module.training:
                return output
            evaluations.append(1)
            return output * math.nan if len(evaluations) == 1 else output

        network.get_input_embeddings().register_forward_hook(spoil)

    change_model(change)
    train = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 9}
    train |= {"save_strategy": "steps", "load_best_model_at_end": True}
    record = train_tiny(tiny_recipe(model, rows, tmp_path, data={"eval_path": str(eval_rows)}, train=train))
    evals = [step.eval_loss for step in metrics_of(tmp_path)]
    assert math.isnan(evals[0]) and math.isfinite(evals[1])
    assert record.best_step in (2, 3) and record.eval_loss == min(evals[1:])
    assert any("the eval loss after step 1 is nan" in text for text in record.events)
    assert verify_checkpoint(tmp_path / "checkpoint-3").best_step == record.best_step


# -- numbers that are not finite --------------------------------------------------------------------------------------


def assert_nothing_but_finite_numbers(output: Path) -> None:
    for path in output.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor.float()).all() for tensor in load_file(path).values()), path


def spoilt_from_call(call: int, what: str) -> Callable[[nn.Module], None]:
    """From its `call`-th forward pass on the model gives NaN ('all'), or only its gradients are infinite ('gradient'),
    or only its loss is: the end token, which every row trains, becomes impossible ('loss')."""
    calls: list[int] = []

    def change(network: nn.Module) -> None:
        def spoil(module, inputs, output):
            calls.append(1)
            if len(calls) < call:
                return output
            if what == "all":
                return output * math.nan
            if what == "loss":
                return output.masked_fill(torch.arange(output.shape[-1]) == 2, -math.inf)
            output.register_hook(lambda gradient: gradient * math.inf)
            return output

        # The first layer's output: what it hands back reaches the adapter below it.
        place = network.get_output_embeddings() if what == "loss" else network.get_decoder().layers[0]
        place.register_forward_hook(spoil)

    return change


@pytest.mark.parametrize("what", ["all", "gradient", "loss"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(model, rows, tmp_path, change_model, method, what):
    change_model(spoilt_from_call(2 * 2 + 1, what))  # two micro-batches a step: from step 3 on
    train = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    recipe = tiny_recipe(model, rows, tmp_path, method=method, train=train, data={"shuffle": False})
    watcher = Watcher()
    with pytest.raises(NonFiniteLossError) as caught:
        train_tiny(recipe, [watcher])
    error = caught.value
    assert error.exit_code == 4
    told = {"all": "loss nan, gradient norm nan;", "gradient": "loss ", "loss": "loss inf, gradient norm "}
    assert error.given.startswith(f"step 3: {told[what]}")
    assert ("nan" in error.given or "inf" in error.given) and error.given.count("inf") < 2
    assert all(f"{rows.name} row {number}" in error.given for number in (9, 10, 11, 12)), error.given
    assert error.do.endswith(f"the last good checkpoint is {tmp_path / 'checkpoint-2'}")
    found = find_checkpoint(tmp_path, "auto", print)
    assert found is not None and found[1].step == 2
    assert_nothing_but_finite_numbers(tmp_path)
    assert [step.step for step in metrics_of(tmp_path)] == [1, 2]
    assert all(step.loss > 0 and math.isfinite(step.grad_norm) for step in metrics_of(tmp_path))
    assert not (tmp_path / METHODS[method].result_folder).exists()
    record = record_of(tmp_path)
    assert (record.status, record.steps, record.loss, record.adapter) == ("failed", 2, None, None)
    assert record.events[-1] == error.given
    assert watcher.ended == 1, "the progress line is taken off the terminal"


def test_an_update_that_makes_weights_infinite_is_not_saved(model, rows, tmp_path):
    train = {"weight_decay": 1e38, "learning_rate": 10.0, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(NonFiniteLossError, match="made weights that are NaN or infinite"):
        train_tiny(tiny_recipe(model, rows, tmp_path / "saved", method="full", train=train))
    assert not list((tmp_path / "saved").glob("*checkpoint*"))
    train |= {"save_strategy": "no", "max_steps": 1}
    with pytest.raises(NonFiniteLossError, match="made weights that are NaN or infinite"):
        train_tiny(tiny_recipe(model, rows, tmp_path / "exported", method="full", train=train))
    assert not (tmp_path / "exported" / "model").exists()


def test_a_poisoned_model_ends_the_command_with_code_4(model, rows, tmp_path, monkeypatch, capsys):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(model, poisoned)
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        network.get_decoder().layers[1].mlp.down_proj.weight[3, 5] = math.nan
    network.save_pretrained(poisoned)
    output = tmp_path / "run"
    words = ["thriftune", "train", str(poisoned), "--data", str(rows), "--method", "lora", "--output", str(output)]
    monkeypatch.setattr("sys.argv", [*words, "max_steps=3"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 4
    told = capsys.readouterr().err
    assert "error: step 1: loss nan" in told and "there is no good checkpoint" in told and "Traceback" not in told
    assert record_of(output).status == "failed"
    assert metrics_of(output) == []


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(model, rows, tmp_path):
    """The disk fills up after step 2 is saved; not even the record fits, and the first error is still what is told."""
    train = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with small_disk(tmp_path / "disk", 6) as disk:
        output = disk / "run"

        def fill(metrics) -> None:
            if metrics.step == 3:
                with pytest.raises(OSError), (disk / "junk").open("wb", buffering=0) as junk:
                    while junk.write(bytes(4096)):
                        pass

        with pytest.raises(DiskFullError) as caught:
            train_tiny(tiny_recipe(model, rows, output, train=train), [Watcher(fill)])
        assert caught.value.exit_code == 3
        assert caught.value.do.endswith(f"the last good checkpoint is {output / 'checkpoint-2'}")
        assert verify_checkpoint(output / "checkpoint-2").step == 2
        assert not list(output.glob(".*")) and not (output / "checkpoint-3").exists()
        assert not (output / "record.json").exists()
        # Freed, the run goes on from there as if nothing had been.
        (disk / "junk").unlink()
        record = train_tiny(tiny_recipe(model, rows, output, train={**train, "resume_from_checkpoint": "auto"}))
        assert (record.status, len(metrics_of(output))) == ("done", 6)
        losses = losses_of(output)
    train_tiny(tiny_recipe(model, rows, tmp_path / "plain"))
    assert losses == losses_of(tmp_path / "plain")


def test_too_little_room_for_a_checkpoint_is_seen_beforehand(model, rows, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    with pytest.raises(DiskFullError, match=r": 102 KiB needed, 48\.83 KiB free"):
        train_tiny(tiny_recipe(model, rows, tmp_path, train={"save_strategy": "epoch"}))
    record = record_of(tmp_path)
    assert (record.status, record.steps) == ("failed", 6)


# -- the run's folder -------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(model, rows, tmp_path):
    train_tiny(tiny_recipe(model, rows, tmp_path, train={"max_steps": 1}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="already holds a run"):
        train_tiny(tiny_recipe(model, rows, tmp_path, train={"max_steps": 2}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_refused_before_its_first_step_leaves_the_folder_free_for_the_corrected_one(model, rows, tmp_path):
    with pytest.raises(InputError, match="adamw_8bit on cpu"):
        train_tiny(tiny_recipe(model, rows, tmp_path, train={"optim": "adamw_8bit"}))
    assert not (tmp_path / "record.json").exists()
    train_tiny(tiny_recipe(model, rows, tmp_path, train={"max_steps": 1}))
    assert "adamw_8bit" not in (tmp_path / "recipe.yaml").read_text()


def test_rows_longer_than_the_models_positions_are_refused_before_anything_is_loaded(model, rows, tmp_path):
    short = tiny_model(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(InputError, match="positions") as caught:
        prepare_run(tiny_recipe(short, rows, tmp_path / "run"))
    assert "max_length=16" in caught.value.do
    assert prepare_run(tiny_recipe(short, rows, tmp_path / "run", data={"max_length": 16})).recipe.method == "lora"


def test_without_a_name_the_folder_is_numbered_and_resuming_takes_the_last(model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(**train) -> str | None:
        recipe = tiny_recipe(model, rows, Path("unused"), train=train).replace(output=None)
        return prepare_run(recipe).recipe.output

    assert folder() == "runs/model-rows-lora"
    for made, expected in (("runs/model-rows-lora", 2), ("runs/model-rows-lora-2", 3)):
        Path(made).mkdir(parents=True)
        assert folder() == f"runs/model-rows-lora-{expected}"
    assert folder(resume_from_checkpoint="auto") == "runs/model-rows-lora-2"
