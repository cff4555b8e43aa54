"""The grid of a comparison: which cells a line makes, what it refuses, and what a search and a budget do with them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from thriftune.catalog.gpus import LocalGpu, find_gpu
from thriftune.catalog.models import find_model
from thriftune.compare import child
from thriftune.compare.budget import Rent, Trimmed, find_rent, limit_s, planned_s, trim
from thriftune.compare.child import Seat
from thriftune.compare.folder import check, claim
from thriftune.compare.grid import Cell, Grid, make_grid
from thriftune.compare.jobs import Planned, Question
from thriftune.compare.locks import held_by_children, held_by_comparison, wait_for_orphans
from thriftune.compare.rates import Tried, best_rate, search_recipe, search_seed, search_steps, waves_of_rates
from thriftune.errors import InputError, OutputError, RecipeError
from thriftune.plan.plan import plan_method
from thriftune.plan.search import Case, Device
from thriftune.plan.work import assumed_rows
from thriftune.planning import read_market
from thriftune.shapes import from_config

QUESTION = Question("reviews", "test", None, None)
POCKET = {"model": "pocket", "data": "reviews"}


def grid(*words: str, methods: str = "base,full,lora,qlora", seeds: str = "2", config: Path | None = None) -> Grid:
    return make_grid(words, config, POCKET, methods.split(","), seeds)


def names(made: Grid) -> list[str]:
    return [cell.name for cell in made.cells]


# ---------------------------------------------------------------- cells


def test_the_base_comes_first_and_then_whole_seeds():
    made = grid()
    assert names(made) == ["base", *(f"{m}-seed{s}" for s in (42, 43) for m in ("full", "lora", "qlora"))]
    assert [cell.recipe("out").method for cell in made.cells[1:4]] == ["full", "lora", "qlora"]
    assert {cell.recipe("out").seed for cell in made.cells[1:4]} == {42}


def test_a_falling_rank_has_its_own_start_and_its_own_sweep():
    """lora_r is for lora; the other options of the adapter are for both."""
    made = grid("lora_r=8", "lora_alpha=4", "dynamic:keep=0.25,0.5", methods="lora,dynamic", seeds="1")
    found = {cell.variant: cell.recipe("out") for cell in made.cells}
    assert list(found) == ["lora", "dynamic dynamic.keep=0.25", "dynamic dynamic.keep=0.5"]
    assert {recipe.lora.alpha for recipe in found.values()} == {4.0}
    assert found["lora"].lora.r == 8 and found["dynamic dynamic.keep=0.25"].dynamic.keep == 0.25
    assert list(grid("lora_r=4,8", methods="lora,dynamic", seeds="1").cells[0].overrides) == ["lora.r"]
    with pytest.raises(InputError, match="lora_r=8: has no effect with dynamic"):
        grid("dynamic:lora_r=8", methods="lora,dynamic")


def test_seeds_are_a_count_from_the_recipes_or_a_list(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\n")
    assert grid(seeds="3", config=recipe).seeds == (7, 8, 9)
    assert grid(seeds="5,1").seeds == (5, 1)
    assert grid(seeds="4,").seeds == (4,)


def test_a_sweep_reaches_the_methods_on_which_it_has_an_effect():
    made = grid("lora_r=4,8", "qlora:learning_rate=1e-3,2e-3", "full:learning_rate=1e-5", seeds="1")
    found = {cell.variant: cell for cell in made.cells}
    assert list(found) == [
        *("base", "full", "lora lora.r=4", "lora lora.r=8"),
        *(f"qlora lora.r={r} train.learning_rate={rate}" for r in (4, 8) for rate in ("1e-3", "2e-3")),
    ]
    assert found["lora lora.r=8"].recipe("out").lora.r == 8
    assert found["lora lora.r=8"].overrides == {"lora.r": 8}
    assert found["full"].recipe("out").train.learning_rate == 1e-5
    assert found["full"].rate_given and not found["lora lora.r=4"].rate_given
    assert len(set(names(made))) == len(made.cells)


def test_products_in_8_bit_floats_are_of_frozen_weights_and_can_be_swept():
    made = grid("precision=fp8,auto", methods="full,lora", seeds="1")
    assert [cell.variant for cell in made.cells] == ["full", "lora precision=fp8", "lora precision=auto"]
    full, lora = (cell.recipe("out") for cell in made.cells[:2])
    assert (full.precision, lora.precision) == ("auto", "fp8")
    with pytest.raises(RecipeError, match="not built in for a rank that changes"):
        grid("precision=fp8", methods="lora,dynamic")


def test_a_key_written_twice_is_a_sweep_too_and_a_list_is_one_value():
    assert len(grid("lora_r=4", "r=8", methods="lora", seeds="1").cells) == 2
    (cell,) = grid("lora_target_modules=q_proj,v_proj", methods="lora", seeds="1").cells
    assert cell.recipe("out").lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["max_length=64", "max_length=128"], "cannot stand in one table"),
        (["lora:max_samples=5"], "cannot stand in one table"),
        (["full:lora_r=4"], "has no effect with full"),
        (["base:learning_rate=1"], "the base is not trained"),
        (["learning_rat=1"], "did you mean learning_rate"),
        (["seed=1"], "--seeds"),
        (["output=x"], "--output"),
        (["lora_r=4,4"], "a value twice"),
    ],
)
def test_words_that_make_no_fair_comparison_are_refused(words, said):
    with pytest.raises(InputError) as caught:
        grid(*words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": "base,lroa"}, "did you mean lora"),
        ({"seeds": "many"}, "--seeds many"),
        ({"seeds": "0"}, "how many seeds"),
        ({"seeds": "1,1"}, "each seed once"),
    ],
)
def test_options_that_name_nothing_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        grid(**options)


def test_a_value_that_a_recipe_refuses_is_refused_before_anything_runs():
    with pytest.raises(RecipeError, match=r"lora\.r"):
        grid("lora_r=4,none")


# ---------------------------------------------------------------- the folder


def test_a_comparison_may_grow_and_nothing_of_it_may_change(tmp_path):
    claim(tmp_path, grid("lora_r=4", methods="base,lora", seeds="1"), QUESTION, True, 1)
    check(tmp_path, grid("lora_r=4", methods="base,lora,qlora", seeds="3"), QUESTION, True, 1)
    refused = {
        "lora.r is 4 there, 8": (grid("lora_r=8", methods="base,lora", seeds="1"), QUESTION, True, 1),
        "methods: base there": (grid("lora_r=4", methods="lora", seeds="1"), QUESTION, True, 1),
        "seeds: 42 there": (grid("lora_r=4", methods="base,lora", seeds="7,"), QUESTION, True, 1),
        "task: reviews there, sums": (
            grid("lora_r=4", methods="base,lora", seeds="1"), Question("sums", "test", None, None), True, 1,
        ),
        "search: True there": (grid("lora_r=4", methods="base,lora", seeds="1"), QUESTION, False, 1),
    }  # fmt: skip
    for said, asked in refused.items():
        with pytest.raises(InputError, match="another comparison") as caught:
            check(tmp_path, *asked)
        assert said in str(caught.value)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError):
        claim(tmp_path, grid(), QUESTION, True, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------- the budget


def hour(cell: Cell) -> float:
    return 0.0 if cell.seed is None else 3600.0


def test_a_budget_leaves_out_whole_seeds_from_the_last():
    made = grid(seeds="3")
    kept = trim(made.cells, hour, 0.0, 7 * 3600, None)
    assert {cell.seed for cell in kept.kept} == {None, 42, 43} and len(kept.kept) == 7
    assert {cell.seed for cell in kept.skipped} == {44} and len(kept.skipped) == 3
    assert "seed 44" in kept.note
    assert trim(made.cells, hour, 0.0, 9 * 3600, None).skipped == ()
    assert {cell.seed for cell in trim(made.cells, hour, 1.0, 9 * 3600, None).skipped} == {44}


def test_a_budget_below_one_seed_is_refused_with_the_smallest_that_is_enough():
    with pytest.raises(InputError, match="--budget-hours 3") as caught:
        trim(grid().cells, hour, 0.0, 3600, None)
    enough = float(str(caught.value).split("--budget-hours ")[1].split()[0])
    assert trim(grid().cells, hour, 0.0, enough * 3600, None).kept


def test_dollars_are_those_of_the_named_gpu_and_refused_without_one():
    market = read_market()
    gpu = find_gpu("h200", {row.key: row for row in market.gpus})
    price = next(price for price in market.prices_of(gpu) if price.kind == "on-demand")
    rent = Rent(gpu, price, price.date)
    assert rent.words().endswith(f"seen {price.date}")
    assert "more than 180 days ago" in Rent(gpu, price, price.date + timedelta(days=181)).words()
    assert rent.usd(rent.seconds(12.5)) == pytest.approx(12.5)
    assert limit_s(12.5, 1e9, rent) == pytest.approx(rent.seconds(12.5))
    assert limit_s(1e9, 0.5, rent) == 1800
    with pytest.raises(InputError, match="--gpu"):
        limit_s(1.0, None, None)


def test_a_budget_in_dollars_trims_by_the_plan_of_each_method_before_anything_starts():
    """The plans are those of an 8B on an H200, at the price of that GPU: three seeds fit, then two, then none."""
    market = read_market()
    rent = find_rent("h200", market)
    row = find_model("llama-3-8b")
    assert rent is not None and row is not None
    made = grid(methods="base,lora,qlora", seeds="3")
    plans = {}
    for cell in made.cells[1:3]:
        recipe = cell.recipe("planned")
        case = Case(from_config(row.config, row.name), recipe, assumed_rows(recipe))
        device = Device(rent.gpu, 1, rent.gpu.usable_bytes)
        plans[cell.variant] = plan_method(case, recipe.method, device, market)
    planned = Planned(1000, 63, "", "h200", plans, [])
    each_usd = rent.usd(sum(plan.run_s for plan in plans.values()))

    def kept(budget_usd: float) -> Trimmed:
        most_s = limit_s(budget_usd, None, rent)
        return trim(made.cells, lambda cell: planned_s(planned, cell), 0.0, most_s, rent)

    assert kept(3.01 * each_usd).skipped == ()
    two = kept(2.99 * each_usd)
    assert [cell.name for cell in two.skipped] == ["lora-seed44", "qlora-seed44"] and len(two.kept) == 5
    with pytest.raises(InputError, match=r"--budget-usd \d"):
        kept(0.5 * each_usd)


# ---------------------------------------------------------------- the search


def searched(default: float, measure: Callable[[float], Tried]) -> list[Tried]:
    """All that a search tries when each rate comes out as `measure` says."""
    waves, tried = waves_of_rates(default), []
    wave = next(waves)
    while True:
        assert wave and len(set(wave)) == len(wave)
        found = [measure(rate) for rate in wave]
        tried += found
        try:
            wave = waves.send(found)
        except StopIteration:
            return tried


@pytest.mark.parametrize("best", [3e-7, 2e-5, 3e-4, 0.02])
def test_the_search_walks_to_the_valley_and_looks_on_both_sides(best):
    tried = searched(2e-4, lambda rate: Tried(rate, abs(math.log(rate / best))))
    found = best_rate(tried)
    assert found is not None
    assert best / 2.1 <= found <= best * 2.1
    rates = [one.rate for one in tried]
    assert min(rates) < found < max(rates) and len(set(rates)) == len(rates) <= 10


def test_rates_that_diverge_are_passed_over_and_the_way_is_down():
    tried = searched(2e-4, lambda rate: Tried(rate, None, "diverged") if rate > 5e-5 else Tried(rate, 1.0))
    assert best_rate(tried) is not None and best_rate(tried) < 5e-5
    assert best_rate([Tried(1.0, math.nan), Tried(2.0, None, "diverged")]) is None


def test_a_try_trains_on_the_training_split_alone_with_a_seed_of_its_own():
    made = make_grid(["eval_split=test", "warmup_steps=20"], None, POCKET, ["lora"], "2")
    recipe = search_recipe(made.cells[0], 1e-3, 400, 2000, made.seeds, Path("out"))
    assert recipe.data.eval_split is None and recipe.data.eval_path is None and recipe.data.split == "train"
    assert recipe.data.eval_fraction == 0.1 and recipe.seed not in made.seeds
    assert recipe.train.max_steps == recipe.train.eval_steps == search_steps(400) == 120
    assert recipe.train.warmup_steps == 6 and recipe.train.learning_rate == 1e-3
    assert search_steps(30) == 30 and search_steps(100) == 50
    assert search_seed([2**32 - 1]) != 2**32 - 1


# ---------------------------------------------------------------- several at once


def test_seats_take_the_gpus_in_turn_and_share_the_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    gpus = [LocalGpu(0, "GPU-a", "A", None, None, None, None), LocalGpu(1, "", "B", None, None, None, None)]
    monkeypatch.setattr(child, "local_gpus", lambda: gpus)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert child.seats(1) == (Seat(),)
    assert child.seats(2) == (Seat("GPU-a", 6, 0), Seat("1", 6, 0))
    assert child.seats(3) == (Seat("GPU-a", 4, 1), Seat("1", 4, 0), Seat("GPU-a", 4, 1))
    monkeypatch.setattr(child, "local_gpus", list)
    assert child.seats(2) == (Seat(None, 6, 1), Seat(None, 6, 1))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert child.seats(2) == (Seat(None, None, 1), Seat(None, None, 1))


def test_children_work_side_by_side_and_a_new_comparison_waits_for_those_of_an_old_one(tmp_path):
    with held_by_children(tmp_path), held_by_children(tmp_path):
        waiting = threading.Thread(target=wait_for_orphans, args=(tmp_path,), daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_one_comparison_at_a_time_holds_a_folder(tmp_path):
    with held_by_comparison(tmp_path), pytest.raises(InputError, match="another comparison is running"):
        held_by_comparison(tmp_path).__enter__()
    with held_by_comparison(tmp_path):
        pass
