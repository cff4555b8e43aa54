"""Sites of lower rank: which components they train and send, with which moments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federation import Federation, gradient_of, recipe_of
from thriftune.errors import CheckpointError
from thriftune.federated.aggregate import Factors
from thriftune.federated.message import open_message
from thriftune.train.loop import mean_loss
from thriftune.train.optim import LearningRate
from tiny import tiny_model, tiny_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("parts") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("parts") / "rows.jsonl", 48)


def test_a_site_of_lower_rank_trains_a_part_in_turn_and_sends_that_only(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """Rank 2 of 4: the first two components and the last two, round about; the rest stays as it is."""
    ranks = {"small": 2, "large": 4}
    federation = Federation(recipe_of(model, rows, tmp_path), ranks)
    sites = {name: federation.site(name) for name in ranks}
    for first in (0, 2, 0):
        for name, site in sites.items():
            data = site.answer(federation.coordinator.offer(name))
            if name == "small":
                _check_small(federation, data, first)
            federation.coordinator.take(name, data)
        federation.coordinator.close(lambda: None)


def _check_small(federation: Federation, data: bytes, first: int) -> None:
    current, after = federation.coordinator.current, federation.base.places.read()
    others, part = [2, 3] if first == 0 else [0, 1], slice(first, first + 2)
    moved = 0.0
    for name, factors in after.items():
        assert torch.equal(factors.b_OR[:, others], current[name].b_OR[:, others].bfloat16().float())
        assert torch.equal(factors.a_RI[others], current[name].a_RI[others].bfloat16().float())
        moved += float((factors.b_OR[:, part] - current[name].b_OR[:, part]).norm())
    assert moved > 0.0
    sides = sum(out + into for out, into in federation.base.places.shapes().values())
    message = open_message(data)
    assert (message.header.first, message.header.rank) == (first, 2)
    assert len(message.body) == 2 * 2 * sides
    assert len(data) - len(message.body) < 600


def test_a_site_that_misses_every_other_round_trains_all_its_parts(model: Path, rows: Path, tmp_path: Path) -> None:
    federation = Federation(recipe_of(model, rows, tmp_path, rounds=4), {"small": 2, "large": 4})
    sites, trained = {name: federation.site(name) for name in ("small", "large")}, []
    for number in range(4):
        for name, site in sites.items():
            if name == "large" or number % 2 == 0:
                data = site.answer(federation.coordinator.offer(name))
                trained += [open_message(data).header.first] if name == "small" else []
                federation.coordinator.take(name, data)
        federation.coordinator.close(lambda: None)
    assert trained == [0, 2]


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_each_part_has_moments_of_its_own(model: Path, rows: Path, tmp_path: Path, engine: str) -> None:
    """A site of rank 2 alone, four rounds of two steps, against AdamW over the components of each part by hand. Its
    epsilon keeps noise from becoming a step."""
    settings, train = {"send_dtype": "float32", "local_steps": 2}, {"adam_epsilon": 1e-3}
    recipe = recipe_of(model, rows, tmp_path, rounds=4, engine=engine, federated=settings, train=train)
    federation = Federation(recipe, {"a": 2, "b": 2})
    site, places = federation.site("a"), federation.base.places
    by_hand: dict[int, torch.optim.AdamW] = {}
    for round_number in range(4):
        first = 2 * (round_number % 2)
        offer = federation.coordinator.offer("a")
        start = {name: (part.b_OR.clone(), part.a_RI.clone()) for name, part in federation.coordinator.current.items()}
        data = site.answer(offer)
        answered = places.read()
        copies = _steps_by_hand(federation, by_hand, start, first, round_number)
        for (name, part), (b, a) in zip(answered.items(), copies, strict=True):
            assert torch.allclose(part.b_OR[:, first : first + 2], b, rtol=1e-5, atol=1e-7), (round_number, name)
            assert torch.allclose(part.a_RI[first : first + 2], a, rtol=1e-5, atol=1e-7), (round_number, name)
        federation.coordinator.take("a", data)
        federation.coordinator.close(lambda: None)


def _steps_by_hand(
    federation: Federation,
    optimizers: dict[int, torch.optim.AdamW],
    start: dict[str, tuple[Tensor, Tensor]],
    first: int,
    round_number: int,
) -> list[tuple[Tensor, Tensor]]:
    """The part's factors after the round's steps, with torch's AdamW over them and the path's gradients."""
    base, part = federation.base, slice(first, first + 2)
    job, train = base.job, base.job.recipe.train
    base.places.write({name: Factors(b, a) for name, (b, a) in start.items()})
    if first not in optimizers:
        copies = [
            torch.nn.Parameter(tensor) for b, a in start.values() for tensor in (b[:, part].clone(), a[part].clone())
        ]
        betas = (train.adam_beta1, train.adam_beta2)
        optimizers[first] = torch.optim.AdamW(copies, betas=betas, eps=train.adam_epsilon, weight_decay=0.0)
    optimizer = optimizers[first]
    copies = optimizer.param_groups[0]["params"]
    whole = [tensor for place in base.places.by_name.values() for tensor in ((place.b, True), (place.a, False))]
    rates = LearningRate(train, job.recipe.learning_rate, job.order.steps)
    for step in range(2 * round_number, 2 * round_number + 2):
        examples = [job.train_examples[index] for index in job.order.indices(step)]
        gradients = dict(zip(map(id, job.trainable), gradient_of(base, examples, _targets(examples)), strict=True))
        for copy, (tensor, is_b) in zip(copies, whole, strict=True):
            of_part = gradients[id(tensor)][:, part] if is_b else gradients[id(tensor)][part]
            copy.grad = of_part.clone()
            copy.data.copy_(tensor[:, part] if is_b else tensor[part])
        torch.nn.utils.clip_grad_norm_(copies, train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = 2 * rates.at(step)  # two parts
        optimizer.step()
        with torch.no_grad():
            for copy, (tensor, is_b) in zip(copies, whole, strict=True):
                (tensor[:, part] if is_b else tensor[part]).copy_(copy)
    return [(copies[place].detach(), copies[place + 1].detach()) for place in range(0, len(copies), 2)]


def _targets(examples: Sequence[Any]) -> int:
    return sum(example.num_targets for example in examples)


@pytest.mark.parametrize("ranks", [[1, 2, 4], [1]])
def test_many_steps_at_small_sites_do_not_overshoot(model: Path, rows: Path, tmp_path: Path, ranks: list[int]) -> None:
    """Parts that each go all the way to what they can do alone are too much together, if each counts as the whole."""
    settings = {"local_steps": 20}
    train = {"lr_scheduler_type": "constant", "learning_rate": 2e-3}
    recipe = recipe_of(model, rows, tmp_path, rounds=6, federated=settings, train=train)
    federation = Federation(recipe, {f"site-{number}": ranks[number % len(ranks)] for number in range(3)})
    sites = {name: federation.site(name) for name in federation.coordinator.sites}
    losses = []
    for _ in range(6):
        for name, site in sites.items():
            federation.coordinator.take(name, site.answer(federation.coordinator.offer(name)))
        federation.coordinator.close(lambda: None)
        federation.base.places.write(federation.coordinator.current)
        losses.append(
            mean_loss(federation.base.job, federation.base.path, lambda text: None, federation.prepared.data.train)
        )
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("rank", [4, 2])
def test_a_restarted_site_goes_on_with_its_optimizers(model: Path, rows: Path, tmp_path: Path, rank: int) -> None:
    """A site that was started anew after two rounds goes on like one that kept running, to the bit; of rank 2 it has an
    optimizer for each of two parts, which the last two rounds train again."""
    bytes_of: list[list[bytes]] = []
    for restarts in (False, True):
        recipe = recipe_of(model, rows, tmp_path / str(restarts), rounds=4, federated={"send_dtype": "float32"})
        federation = Federation(recipe, {"a": rank})
        site, sent = federation.site("a", keeps=True), []
        for number in range(4):
            site = federation.site("a", keeps=True) if restarts and number == 2 else site
            data = site.answer(federation.coordinator.offer("a"))
            sent.append(open_message(data).body)
            federation.coordinator.take("a", data)
            federation.coordinator.close(lambda: None)
        bytes_of.append(sent)
    assert bytes_of[0] == bytes_of[1]


def test_a_checkpoint_without_an_optimizer_of_a_part_is_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    federation = Federation(recipe_of(model, rows, tmp_path), {"a": 2})
    site = federation.site("a", keeps=True)
    federation.coordinator.take("a", site.answer(federation.coordinator.offer("a")))
    federation.coordinator.close(lambda: None)
    folder = next((tmp_path / "a").glob("checkpoint-*"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for path in folder.glob("components-*"):
        manifest[path.name.replace("components-0-2-", "")] = manifest.pop(path.name)
        path.rename(folder / path.name.replace("components-0-2-", ""))
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no optimizer of a part"):
        federation.site("a", keeps=True).answer(federation.coordinator.offer("a"))
