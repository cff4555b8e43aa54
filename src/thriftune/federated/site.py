"""A site: the base loaded once, its own rows, its own optimizer; each round the ordinary step, so many times.

The optimizer's moments never leave the site and stay from round to round (docs/decisions/0010). A site's steps are
numbered through all rounds: step s of round n is step n * local_steps + s of the schedule and of the order of its
rows, so a site that missed rounds goes on where the others are.

A site of a lower rank trains another part of the components each round. Each part has an optimizer of its own, and a
learning rate as many times as high as there are parts (docs/decisions/0017).
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thriftune.data import Example
from thriftune.errors import CheckpointError, InputError, RecipeError
from thriftune.federated.adapter import Places, find_places
from thriftune.federated.aggregate import Adapter, parts_of
from thriftune.federated.message import Header, MessageError, expect, factors_of, open_message, pack_update
from thriftune.federated.part import PartialPath, PartOptimizer, without_components_beyond
from thriftune.methods import METHODS, trainable_parameters
from thriftune.models import LoadedModel
from thriftune.recipe import Recipe
from thriftune.recipe.dynamic import PLAIN_STARTS
from thriftune.run import Prepared, export_result, make_job
from thriftune.run_path import hold_memory, load_base, paged_bytes, with_path
from thriftune.train import Observer, Observers, StopRequest, TrainJob
from thriftune.train.checkpoint import TrainState, check_identity, find_checkpoint, prune_checkpoints, write_checkpoint
from thriftune.train.distributed import Processes
from thriftune.train.job import generic_path
from thriftune.train.loop import mean_loss, step_metrics, train_step
from thriftune.train.meter import Meter
from thriftune.train.optim import LAYOUT_FILE, LearningRate, build_optimizer, load_optimizer, save_optimizer
from thriftune.train.path import StepPath

# Of lora.init_lora_weights: the base stays as it is, B A is zero, and the factors are drawn without a look at the base,
# so the coordinator, which has none, draws the same.
STARTS = (*PLAIN_STARTS, "orthogonal")


@dataclass(frozen=True)
class Base:
    """A model with the recipe's adapter on it, and the path that computes its gradients. Sites of one process share
    it."""

    loaded: LoadedModel
    job: TrainJob
    path: StepPath
    places: Places
    path_reason: str


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError for what sites cannot do together, and for a length of the run that they would not keep to."""
    problems = recipe.federated.contradictions()
    if recipe.method not in ("auto", "lora", "qlora"):
        problems.append(f"method {recipe.method}: sites share an adapter of one rank; use method lora, qlora or auto")
    if recipe.lora.init_lora_weights not in STARTS:
        problems.append(
            f"lora.init_lora_weights {recipe.lora.init_lora_weights!r}: the coordinator draws the start without the "
            "base's weights, which must stay as they are; use true, gaussian or orthogonal"
        )
    if recipe.train.weight_decay:
        problems.append("train.weight_decay would shrink what a site does not train; leave it at 0")
    steps = _steps_of_rounds(recipe)
    if recipe.train.max_steps != steps:  # a recipe that recipe_of_rounds has been through has them
        problems += [
            f"train.{key}={getattr(recipe.train, key):g}: a site makes federated.rounds x federated.local_steps = "
            f"{steps} steps; drop it, or write train.max_steps={steps}"
            for key in ("max_steps", "num_train_epochs")
            if key in recipe.train.model_fields_set
        ]
    if problems:
        raise RecipeError(problems, "the recipe")


def _steps_of_rounds(recipe: Recipe) -> int:
    return recipe.federated.rounds * recipe.federated.local_steps


def terms_of(recipe: Recipe) -> str:
    """Fingerprint of what both ends must have in common, beside the adapter's shapes."""
    text = json.dumps([recipe.lora.model_dump(mode="json"), recipe.federated.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_of_rounds(recipe: Recipe) -> Recipe:
    """The recipe with its number of steps: those of all rounds."""
    check_recipe(recipe)
    return recipe.replace(train={"max_steps": _steps_of_rounds(recipe)})


def open_base(prepared: Prepared, output: Path, say: Callable[[str], None]) -> Base:
    """Load the model, whole or streamed, and attach the adapter, as a run does."""
    recipe, device = prepared.recipe, prepared.device
    method = METHODS[recipe.method]
    hold_memory(device, recipe, 0)
    base = load_base(
        recipe,
        prepared.description,
        device=device,
        dtype=prepared.dtype,
        four_bit=method.four_bit,
        streams=prepared.planned.streams or recipe.resident_layers is not None,
        world=1,
        say=say,
    )
    model = method.attach(base.loaded, recipe)
    hold_memory(device, recipe, paged_bytes(recipe, trainable_parameters(model)))
    processes = Processes(0, 1, device)
    job = make_job(prepared, method, base.loaded, model, processes, output, "the same command again")
    job, reason = with_path(job, base.store, say)
    return Base(base.loaded, job, job.path or generic_path(job), find_places(model), reason)


class Site:
    """One site over a base. `offer -> update` is all that others see of it."""

    def __init__(
        self,
        base: Base,
        name: str,
        examples: Sequence[Example],
        output: Path,
        observers: Sequence[Observer],
        keeps: bool,
    ) -> None:
        """`keeps`: write the optimizer to `output` after each round, and take up there when started again."""
        self.name, self.output = name, output
        self._keeps = keeps
        self._base = base
        draws = zlib.crc32(name.encode())
        self._job = replace(base.job, train_examples=examples, output=output, draws=draws)
        self._path = PartialPath(base.path, base.places, 0, base.places.rank)
        self._observers = Observers(observers)
        recipe = self._job.recipe
        self._whole, _, remark = build_optimizer(self._job.model, recipe, self._job.processes.device)
        self._optimizers: dict[tuple[int, int], torch.optim.Optimizer] = {}  # of the parts that were trained
        if remark:
            self._observers.event(remark)
        self._rate = LearningRate(recipe.train, recipe.learning_rate, self._job.order.steps)
        self._state = TrainState(identity={})
        self.targets = sum(example.num_targets for example in examples)

    def end(self, message: bytes) -> Path:
        """Take the result of the federation, and write it as a PEFT folder. Returns the folder."""
        opened = open_message(message)
        self._check(opened.header, "end")
        places, job = self._base.places, self._job
        places.write(factors_of(opened, places.shapes(), places.read()))
        result = self.output / job.method.result_folder
        export_result(job.method, job.model, self._base.loaded, job.recipe, result)
        return result

    def _check(self, header: Header, kind: str) -> None:
        places, rounds = self._base.places, self._job.recipe.federated.rounds
        expect(header, kind=kind, site=self.name, half="both", rank=places.rank, differences=False)
        if joined := self._state.identity:
            expect(header, federation=joined["federation"], train_rank=joined["rank"])
        part, rank = (header.train_first, header.train_end), header.train_rank
        known = 1 <= rank <= places.rank and part in self._parts(rank)
        if not (known and 0 <= header.round < rounds + (kind == "end")):
            raise MessageError(
                given=f"an offer of round {header.round + 1} to a site of rank {rank}, to train the components from "
                f"{part[0]} to {part[1]}",
                allowed=f"rounds 1 to {rounds}, ranks 1 to {places.rank}, and a part that sites of that rank have",
                do="it is not used; look at the coordinator",
            )
        ours = (places.fingerprint(), terms_of(self._job.recipe))
        if (header.places, header.terms) != ours:
            raise InputError(
                given="the coordinator's adapter or its options of the rounds are not those of this site",
                allowed="the same model, lora options and federated options at both ends",
                do="give both the same recipe with --config",
            )

    def _join(self, header: Header) -> None:
        """At the first offer: take up the optimizers of the last round that was finished in this folder, if there is
        one. Raises CheckpointError when the folder belongs to another federation."""
        if self._state.identity:
            return
        identity = {**self._job.identity, "federation": header.federation, "rank": header.train_rank}
        found = find_checkpoint(self.output, "auto", self._observers.event) if self._keeps else None
        if found is None:
            self._state = TrainState(identity=identity)
            return
        folder, state = found
        check_identity(folder, state, identity)
        trained = [
            part for part in self._parts(header.train_rank) if (folder / f"{_prefix(*part)}{LAYOUT_FILE}").exists()
        ]
        if not trained:
            raise CheckpointError(
                given=f"{folder} has no optimizer of a part that a site of rank {header.train_rank} trains",
                allowed="a checkpoint that this version of thriftune wrote",
                do="start this site in another folder: its optimizers then begin anew",
            )
        for part in trained:
            load_optimizer(self._optimizer(*part), folder, _prefix(*part))
        self._path.resume(state.path)
        self._state = state  # only now: a folder that was refused is refused again
        self._observers.event(f"went on from {folder}")

    def answer(self, offer: bytes) -> bytes:
        """The update that answers an offer: take its factors, train, send what was trained.

        Raises MessageError for an offer that is damaged, not for this site, or of another federation than the one it
        is in; CheckpointError when its folder belongs to another federation; and what training raises.
        """
        message = open_message(offer)
        header = message.header
        self._check(header, "offer")
        self._join(header)
        places, rounds = self._base.places, self._job.recipe.federated
        places.write(factors_of(message, places.shapes(), places.read()))
        if rounds.aggregation == "fedit":
            without_components_beyond(places, header.train_rank)
        before = places.read()
        loss, train_s = self._train(header)
        after = places.read()
        self._check_frozen(before, after, header)
        if self._keeps:
            self._keep()
        first, end = header.train_first, header.train_end
        update: dict[str, Any] = {"kind": "update", "first": first, "rank": end - first, "half": header.train}
        if rounds.clip_norm is None:  # with it nothing of the rows leaves but the factors, which are clipped
            update |= {"targets": self.targets, "loss": loss, "train_s": train_s}
        return pack_update(header.model_copy(update=update), before, after)

    def _train(self, header: Header) -> tuple[float, float]:
        """One round. Returns (mean loss over its target tokens, seconds)."""
        job, rounds = self._job, self._job.recipe.federated
        self._path.half, self._path.first, self._path.end = header.train, header.train_first, header.train_end
        optimizer = self._optimizer(header.train_first, header.train_end)
        times = len(self._parts(header.train_rank))
        first = header.round * rounds.local_steps
        meter, losses = Meter(job.processes.device, energy=False), []  # the sites of a simulation share a GPU
        job.model.train()
        self._observers.start(first, job.order.steps)
        for step in range(first, first + rounds.local_steps):
            events: list[str] = []
            started, rate = time.perf_counter(), times * self._rate.at(step)
            result = train_step(job, optimizer, self._path, step, rate, StopRequest(), self._teller(events))
            self._state.step, self._state.tokens_seen = step + 1, self._state.tokens_seen + result.tokens
            losses.append((result.loss, result.targets))
            took_s = time.perf_counter() - started
            metrics = step_metrics(job, self._state, result, self._path, meter, rate, took_s, None, events)
            self._observers.step(metrics)
        self._observers.end()
        targets = sum(count for _, count in losses)
        return sum(loss * count for loss, count in losses) / targets, meter.elapsed_s()

    def _check_frozen(self, before: Adapter, after: Adapter, header: Header) -> None:
        """Raise InputError when an optimizer moved what has no gradient: the coordinator takes it to stand still."""
        still_R = torch.ones(self._base.places.rank, dtype=torch.bool)
        still_R[header.train_first : header.train_end] = False
        still_b, still_a = (torch.ones_like(still_R) if header.train == half else still_R for half in ("a", "b"))
        for name, now in after.items():
            same_b = torch.equal(now.b_OR[:, still_b], before[name].b_OR[:, still_b])
            if not same_b or not torch.equal(now.a_RI[still_a], before[name].a_RI[still_a]):
                raise InputError(
                    given=f"train.optim={self._job.recipe.train.optim} changed components of {name} that do not train",
                    allowed="an optimizer that leaves alone what has no gradient",
                    do="use train.optim=adamw_torch",
                )

    def _teller(self, events: list[str]) -> Callable[[str], None]:
        def say(text: str) -> None:
            events.append(text)
            self._observers.event(text)

        return say

    def _parts(self, rank: int) -> list[tuple[int, int]]:
        return parts_of(self._job.recipe.federated.aggregation, rank, self._base.places.rank)

    def _optimizer(self, first: int, end: int) -> torch.optim.Optimizer:
        """That of the components `first` to `end`; it is made when they are first trained."""
        part, places, job = (first, end), self._base.places, self._job
        if part not in self._optimizers:
            is_whole = part == (0, places.rank)
            self._optimizers[part] = (
                self._whole if is_whole else PartOptimizer(places, first, end, job.recipe, job.processes.device)
            )
        return self._optimizers[part]

    def _keep(self) -> None:
        self._state.path = self._path.state()

        def write_parts(folder: Path) -> None:
            self._job.method.save(self._job.model, folder)
            for (first, end), optimizer in self._optimizers.items():
                save_optimizer(optimizer, folder, _prefix(first, end))

        expected = sum(12 * parameter.numel() for parameter in self._job.trainable)
        write_checkpoint(self.output, self._state, write_parts, expected)
        prune_checkpoints(self.output, self._state.step, 1, None)


def _prefix(first: int, end: int) -> str:
    """Of the files that hold the states of a part's optimizer."""
    return f"components-{first}-{end}-"


def eval_loss(base: Base) -> float | None:
    """Mean loss over the recipe's eval rows with the factors that are in the model now; None without such rows."""
    if not base.job.eval_examples:
        return None
    return mean_loss(base.job, base.path, lambda text: None, base.job.eval_examples)
