"""A federation against what it stands for: one site is a plain run, equal sites are one, what is frozen stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import Federation, gradient_of, recipe_of
from thriftune.errors import InputError
from thriftune.federated.adapter import Places, start_of
from thriftune.federated.aggregate import Adapter, Factors
from thriftune.federated.coordinator import Coordinator, QuorumError
from thriftune.federated.message import MessageError, factors_of, open_message, pack
from thriftune.federated.records import FederatedRecord
from thriftune.federated.result import round_line
from thriftune.federated.simulate import Simulation, simulate
from thriftune.federated.site import STARTS
from thriftune.methods.lora import read_tensors
from thriftune.recipe import Recipe
from tiny import metrics_of, tiny_model, tiny_rows, train_tiny

MEASURED = {"step_s", "tokens_per_s", "memory_bytes", "peak_bytes", "energy_j"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("federated") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("federated") / "rows.jsonl", 48)


def run_simulation(recipe: Recipe, clients: int, split: str = "even", ranks: Sequence[int] = ()) -> FederatedRecord:
    return simulate(Simulation(recipe, clients, split, ranks, False, "thriftune federate simulate"), lambda text: None)


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_one_site_is_a_plain_run_to_the_bit(model: Path, rows: Path, tmp_path: Path, engine: str, method: str) -> None:
    """Three rounds of two steps, the factors sent in float32 and back, against six steps at one go."""
    plain = recipe_of(model, rows, tmp_path / "plain", method=method, engine=engine)
    train_tiny(plain)
    record = run_simulation(plain.replace(output=str(tmp_path / "one"), federated={"send_dtype": "float32"}), 1)
    site = tmp_path / "one" / "sites" / "site-1"
    ours, theirs = (
        [metrics.model_dump(exclude=MEASURED) for metrics in metrics_of(folder)]
        for folder in (site, tmp_path / "plain")
    )
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in theirs]
    assert ours == theirs and len(ours) == 6
    found = read_tensors(Path(record.adapter) / "adapter_model.safetensors")
    wanted = read_tensors(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("aggregation", ["svd", "rolora", "ffa", "fedit"])
def test_sites_with_equal_data_move_as_one(model: Path, rows: Path, tmp_path: Path, aggregation: str) -> None:
    """The same rows in the same order at three sites: the mean is what each of them did."""
    settings = {"aggregation": aggregation, "send_dtype": "float32"}
    names = {"a": 4, "b": 4, "c": 4}
    federation = Federation(recipe_of(model, rows, tmp_path, federated=settings), names)
    for name in names:
        federation.coordinator.take(name, federation.site(name).answer(federation.coordinator.offer(name)))
    alone = {name: place.b.detach() @ place.a.detach() for name, place in federation.base.places.by_name.items()}
    federation.coordinator.close(lambda: None)
    assert max(float(update.norm()) for update in alone.values()) > 1e-3
    for name, factors in federation.coordinator.current.items():
        assert torch.allclose(factors.b_OR @ factors.a_RI, alone[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("engine", ["auto", "off"])
def test_sites_with_equal_rows_draw_dropout_each_for_itself(
    model: Path, rows: Path, tmp_path: Path, engine: str
) -> None:
    recipe = recipe_of(model, rows, tmp_path / "run", engine=engine, lora={"dropout": 0.5})
    federation = Federation(recipe, {"a": 4, "b": 4})
    sent = {}
    for name in ("a", "b", "a"):
        message = open_message(federation.site(name).answer(federation.coordinator.offer(name)))
        again = sent.get(name)
        sent[name] = (message.header.loss, message.header.targets)
        assert again in (None, sent[name])
    assert sent["a"][1] == sent["b"][1] and sent["a"][0] != sent["b"][0]


def test_the_mean_of_sites_points_where_the_pooled_gradient_does(model: Path, rows: Path, tmp_path: Path) -> None:
    """One step of plain gradient descent would be the pooled step exactly; AdamW's first step is its sign."""
    federation = Federation(recipe_of(model, rows, tmp_path, rounds=1), {"a": 4, "b": 4})
    examples = federation.prepared.data.train
    parts = [examples[:16], examples[16:32]]
    targets = [sum(example.num_targets for example in part) for part in parts]
    pooled = gradient_of(federation.base, [*parts[0], *parts[1]], sum(targets))
    shares = [gradient_of(federation.base, part, count) for part, count in zip(parts, targets, strict=True)]
    weights = [count / sum(targets) for count in targets]
    mean = [
        sum(weight * share[place] for weight, share in zip(weights, shares, strict=True))
        for place in range(len(pooled))
    ]
    assert targets[0] != targets[1]
    for found, wanted in zip(mean, pooled, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_rolora_trains_and_sends_one_factor_a_round(model: Path, rows: Path, tmp_path: Path) -> None:
    federation = Federation(recipe_of(model, rows, tmp_path, federated={"aggregation": "rolora"}), {"a": 4})
    site, shapes = federation.site("a"), federation.base.places.shapes()
    for half in ("b", "a", "b"):
        before = federation.coordinator.current
        data = site.answer(federation.coordinator.offer("a"))
        sides = sum(out if half == "b" else into for out, into in shapes.values())
        assert len(open_message(data).body) == 2 * 4 * sides
        federation.coordinator.take("a", data)
        federation.coordinator.close(lambda: None)
        after = federation.coordinator.current
        assert _same(before, after, "a") == (half == "b") and _same(before, after, "b") == (half == "a")


def _same(before: Adapter, after: Adapter, half: str) -> bool:
    field = "a_RI" if half == "a" else "b_OR"
    return all(torch.equal(getattr(before[name], field), getattr(after[name], field)) for name in before)


@pytest.mark.parametrize(("method", "kind"), [("qlora", True), *(("lora", kind) for kind in STARTS)])
def test_a_model_without_weights_has_the_same_start(
    model: Path, rows: Path, tmp_path: Path, method: str, kind: bool | str
) -> None:
    recipe = recipe_of(model, rows, tmp_path, method=method, lora={"init_lora_weights": kind})
    federation = Federation(recipe, {"a": 4})
    over_weights = federation.base.places.read()
    start: Places = federation.coordinator._places
    assert start.fingerprint() == federation.base.places.fingerprint()
    for name, factors in start.read().items():
        assert torch.equal(factors.a_RI, over_weights[name].a_RI) and torch.equal(factors.b_OR, over_weights[name].b_OR)
        assert float((factors.b_OR @ factors.a_RI).abs().max()) < 1e-6
    _, hollow = start_of(federation.prepared.recipe)
    frozen = [parameter for name, parameter in hollow.named_parameters() if "lora_" not in name]
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in frozen)


def test_messages_that_are_cut_changed_old_or_sent_again_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    federation = Federation(recipe_of(model, rows, tmp_path), {"a": 4, "b": 4})
    coordinator = federation.coordinator
    update = federation.site("a").answer(coordinator.offer("a"))
    changed = bytearray(update)
    changed[-3] ^= 1
    for damaged, words in (
        (update[:-1], "not those its header names"),
        (update[:100], "without a header"),
        (bytes(changed), "not those its header names"),
        (update.replace(b'"rank":4', b'"rank":9'), "rank 9, not 4"),
        (b"{}\n", "cannot be read"),
        (b"", "without a header"),
    ):
        with pytest.raises(MessageError, match=words):
            coordinator.take("a", damaged)
    with pytest.raises(MessageError, match="site 'a', not 'b'"):
        coordinator.take("b", update)
    coordinator.take("a", update)
    with pytest.raises(MessageError, match="second update"):
        coordinator.take("a", update)
    coordinator.close(lambda: None)
    coordinator.offer("a")
    with pytest.raises(MessageError, match="round 0, not 1"):
        coordinator.take("a", update)
    with pytest.raises(MessageError, match="ticket"):
        coordinator.take("a", update.replace(b'"round":0', b'"round":1'))
    with pytest.raises(MessageError, match="bytes of factors"):
        factors_of(open_message(update), {"m": (3, 4)}, coordinator.current)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_rank": 0}, "rank 0"),
        ({"train_rank": 5}, "rank 5"),
        ({"train_rank": 3}, "from 0 to 4"),
        ({"train_rank": 2, "train_end": 3}, "from 0 to 3"),
        ({"train_first": 4}, "from 4 to 4"),
        ({"train_first": -1}, "from -1 to 4"),
        ({"train_end": 5}, "from 0 to 5"),
        ({"round": 3}, "round 4"),
        ({"round": -1}, "round 0"),
        ({"rank": 3}, "rank 3, not 4"),
        ({"site": "b"}, "site 'b', not 'a'"),
        ({"kind": "end"}, "kind 'end', not 'offer'"),
        ({"terms": "other"}, "not those of this site"),
    ],
)
def test_an_offer_that_cannot_be_is_refused_by_the_site(
    model: Path, rows: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    federation = Federation(recipe_of(model, rows, tmp_path), {"a": 4})
    offer = open_message(federation.coordinator.offer("a"))
    before = federation.base.places.read()
    with pytest.raises(InputError, match=words):
        federation.site("a").answer(pack(offer.header.model_copy(update=change), federation.coordinator.current))
    assert _same(before, federation.base.places.read(), "a")


def test_a_round_goes_on_without_a_missing_site_but_not_without_a_quorum(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    federation = Federation(recipe_of(model, rows, tmp_path, federated={"quorum": 0.5}), {"a": 4, "b": 4})
    coordinator = federation.coordinator
    offers = {name: coordinator.offer(name) for name in ("a", "b")}
    with pytest.raises(QuorumError, match="0 of 2 sites") as error:
        coordinator.close(lambda: None)
    assert str(coordinator.folder) in error.value.do and "start" not in error.value.do
    offers = {name: coordinator.offer(name) for name in ("a", "b")}
    coordinator.take("b", federation.site("b").answer(offers["b"]))
    assert coordinator.waits_for == ["a"]
    done = coordinator.close(lambda: None)
    assert done.updates == 1 and [site.change is None for site in done.sites] == [True, False]
    only_b = done.model_copy(update={"sites": done.sites[1:]})  # a was not there and got no offer
    assert round_line(only_b, coordinator).startswith("round 1/3: 1 of 2 sites, ")
    assert coordinator.round == 1


def test_a_poisoned_update_is_refused_by_name_and_does_not_count(model: Path, rows: Path, tmp_path: Path) -> None:
    federation = Federation(recipe_of(model, rows, tmp_path), {"a": 4, "b": 4, "evil": 4})
    coordinator = federation.coordinator
    for name in ("a", "b", "evil"):
        offer = coordinator.offer(name)
        update = federation.site(name).answer(offer)
        if name == "evil":
            message = open_message(update)
            adapter = factors_of(message, federation.base.places.shapes(), coordinator.current)
            next(iter(adapter.values())).b_OR[0, 0] = float("nan")
            update = pack(message.header, adapter)
        coordinator.take(name, update)
    done = coordinator.close(lambda: None)
    assert done.updates == 2
    assert "site evil has values that are not finite" in next(
        site.refused for site in done.sites if site.site == "evil"
    )


def test_with_clipping_nothing_of_the_rows_leaves_but_factors(model: Path, rows: Path, tmp_path: Path) -> None:
    """A huge update is clipped, not refused: what one site sends does not decide about another's."""
    settings = {"aggregation": "ffa", "clip_norm": 0.01}
    federation = Federation(recipe_of(model, rows, tmp_path, federated=settings), {"a": 4, "b": 4, "evil": 4})
    start = federation.coordinator.current
    for name in ("a", "b", "evil"):
        update = federation.site(name).answer(federation.coordinator.offer(name))
        message = open_message(update)
        assert (message.header.targets, message.header.loss, message.header.train_s) == (None, None, None)
        if name == "evil":
            adapter = factors_of(message, federation.base.places.shapes(), start)
            update = pack(message.header, {key: Factors(part.b_OR * 1e6, part.a_RI) for key, part in adapter.items()})
        federation.coordinator.take(name, update)
    done = federation.coordinator.close(lambda: None)
    assert done.updates == 3 and done.energy_kept is None
    moved = [factors.b_OR - start[name].b_OR for name, factors in federation.coordinator.current.items()]
    assert 0.0 < sum(float(part.square().sum()) for part in moved) ** 0.5 <= 0.01 * 1.01


def test_a_coordinator_that_was_stopped_goes_on_and_ends_the_same(model: Path, rows: Path, tmp_path: Path) -> None:
    whole = run_simulation(recipe_of(model, rows, tmp_path / "whole", rounds=2), 2, ranks=[2, 4])
    ranks = dict(whole.sites)
    stopped = Federation(recipe_of(model, rows, tmp_path / "stopped", rounds=2), ranks)
    assert json.loads((tmp_path / "stopped" / "state.json").read_text())["rounds_done"] == 0
    for name in ranks:
        stopped.coordinator.take(name, stopped.site(name).answer(stopped.coordinator.offer(name)))
    stopped.coordinator.close(lambda: None)
    again = Coordinator(stopped.prepared.recipe, ranks, tmp_path / "stopped", None)
    assert again.round == 1 and again.state.federation == stopped.coordinator.state.federation
    for name, factors in again.current.items():
        assert torch.equal(factors.b_OR, stopped.coordinator.current[name].b_OR)
        assert torch.equal(factors.a_RI, stopped.coordinator.current[name].a_RI)


@pytest.mark.parametrize(
    ("train", "measured"),
    [
        ({"eval_strategy": "epoch"}, [True] * 4),  # a recipe's own way when it names none
        ({"eval_strategy": "no"}, [False] * 4),
        ({"eval_strategy": "steps", "eval_steps": 3}, [False, True, True, True]),  # steps 2, 4, 6, 8
        ({"eval_strategy": "steps", "eval_steps": 100}, [False, False, False, True]),
    ],
)
def test_eval_rows_are_measured_when_the_recipe_says_so(
    model: Path, rows: Path, tmp_path: Path, train: dict[str, Any], measured: list[bool]
) -> None:
    recipe = recipe_of(model, rows, tmp_path, rounds=4, data={"eval_fraction": 0.1}, train=train)
    record = run_simulation(recipe, 2)
    assert [entry.eval_loss is not None for entry in record.rounds] == measured


def test_the_record_has_the_bytes_of_each_site_and_round(model: Path, rows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, rows, tmp_path, data={"eval_fraction": 0.1}, train={"eval_strategy": "epoch"})
    record = run_simulation(recipe, 3, ranks=[1, 2, 4])
    assert [site.rank for site in record.rounds[0].sites] == [1, 2, 4]
    for entry in record.rounds:
        assert entry.updates == 3 and entry.eval_loss is not None
        assert entry.energy_kept is not None and 0.0 < entry.energy_kept <= 1.0
        up = [site.bytes_of_factors / site.rank for site in entry.sites]
        assert len(set(up)) == 1
        assert all(site.bytes_down > site.bytes_up > site.bytes_of_factors for site in entry.sites if site.rank < 4)
    assert record.bytes_up == sum(site.bytes_up for entry in record.rounds for site in entry.sites)
    assert sorted(path.name for path in (tmp_path / "rounds").iterdir()) == ["0", "1", "2", "3"]
