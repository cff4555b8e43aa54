"""Cells -> report: what is read, refused, computed, and what stands in the three files and on the terminal."""

import json
import re
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest

from cell_folders import MIB, Made, usual, write_cell, write_cells
from thriftune.catalog.gpus import built_in_gpus
from thriftune.catalog.prices import ElectricityPrice
from thriftune.catalog.rows import Price
from thriftune.errors import InputError
from thriftune.evaluate.intervals import Z_95, wilson
from thriftune.plan.cost import Market
from thriftune.records import RankCut, ReportRecord, ReportValue, read_record
from thriftune.report import build_report, read_cells, report_text, write_report
from thriftune.report.bars import agreement_figure
from thriftune.report.build import CURVE_POINTS, curve
from thriftune.report.plots import _spots, cost_figures, front_of, looks, smoothed
from thriftune.report.search import search_table
from thriftune.report.svg import apart, ticks

PRICE = Price("h200", "Somewhere", "on-demand", 3.60, "its page", date(2026, 11, 1))
MARKET = Market(
    gpus=list(built_in_gpus().values()),
    prices=[PRICE, replace(PRICE, provider="Dearer", usd_per_hour=9.0)],
    electricity=ElectricityPrice(0.2, "a bill", None),
    today=date(2026, 11, 24),
)
MARKUP = '</pre><script>alert("x")</script> **bold** | pipe `tick` ```'


def report_of(folder: Path, cells: list[Made], **changes: object) -> ReportRecord:
    values: dict[str, object] = {"title": "LoRA or QLoRA?", "market": MARKET, "search": None, "notes": []}
    found = read_cells([write_cells(folder, cells)])
    return build_report(found, **{**values, **changes})  # type: ignore[arg-type]


def value(report: ReportRecord, key: str, variant: str) -> ReportValue:
    place = [found.name for found in report.variants].index(variant)
    return next(row.values[place] for row in report.table if row.key == key)


def refused(folder: Path, cells: list[Made]) -> str:
    with pytest.raises(InputError) as caught:
        report_of(folder, cells)
    return caught.value.given


def test_the_articles_rows_come_first_in_its_order(tmp_path: Path) -> None:
    report = report_of(tmp_path, usual())
    keys = [row.key for row in report.table]
    wanted = ["trainable", "trainable_share", "needed_planned", "peak_measured", "reserved_measured", "epoch_planned"]
    wanted += ["epoch_measured", "rent_measured", "tokens_per_s", "energy", "score", "interval", "forgetting"]
    assert [key for key in keys if key in wanted] == wanted
    assert {"result_bytes", "first_token", "first_token_merged", "rent_planned", "train"} <= set(keys)
    assert [variant.label for variant in report.variants] == ["full", "LoRA", "QLoRA", "base"]


def test_numbers_are_means_over_seeds_with_their_spread(tmp_path: Path) -> None:
    report = report_of(tmp_path, usual(rows=1000))
    score = value(report, "score", "lora")
    assert score.by_seed == {"1": 0.93, "2": 0.926, "3": 0.933}
    assert score.mean == pytest.approx(0.92967, abs=1e-5)
    assert score.spread == pytest.approx(0.003512, abs=1e-6)
    assert (score.text, score.spread_text) == ("93.0 %", "± 0.4")
    assert score.low is not None and score.high is not None and 0.9 < score.low < 0.93 < score.high < 0.95
    assert value(report, "peak_measured", "lora").mean == 810 * MIB
    assert value(report, "energy", "lora").text == "10 Wh"
    assert value(report, "forgetting", "full").text == "+0.400"
    assert value(report, "first_token", "base").text == "12.3 ms"


def test_rent_is_the_measured_time_at_the_cheapest_dated_price(tmp_path: Path) -> None:
    report = report_of(tmp_path, [Made("lora", 1, train_s=100.0)])
    assert value(report, "rent_measured", "lora").mean == pytest.approx(0.1)
    assert value(report, "rent_planned", "lora").mean == pytest.approx(0.09)
    note = next(row.note for row in report.table if row.key == "rent_measured")
    assert "Somewhere on-demand, $3.60 an hour" in note
    assert "seen 2026-11-01" in note


def test_an_offer_of_several_gpus_is_paid_whole(tmp_path: Path) -> None:
    market = replace(MARKET, prices=[replace(PRICE, min_gpus=8)])
    report = report_of(tmp_path, [Made("lora", 1, train_s=100.0)], market=market)
    assert value(report, "rent_measured", "lora").mean == pytest.approx(0.8)


def test_another_gpus_price_may_count_and_what_is_old_or_elsewhere_is_said(tmp_path: Path) -> None:
    """A spot price is no price to count on; a chosen GPU's rent is of times that another one took, which is told."""
    other = replace(PRICE, gpu="a100-80gb", usd_per_hour=1.8, date=date(2026, 4, 1))
    spot = replace(PRICE, kind="spot", usd_per_hour=0.1)
    market = replace(MARKET, prices=[PRICE, spot, other])
    own = report_of(tmp_path, [Made("lora", 1, train_s=100.0)], market=market)
    chosen = report_of(tmp_path, [Made("lora", 1, train_s=100.0)], market=market, gpu="A100 80GB")
    assert value(own, "rent_measured", "lora").mean == pytest.approx(0.1)
    assert value(chosen, "rent_measured", "lora").mean == pytest.approx(0.05)
    notes = [next(row.note for row in found.table if row.key == "rent_measured") for found in (own, chosen)]
    assert "days ago" not in notes[0] and "times are of" not in notes[0]
    assert "seen 2026-04-01, more than 180 days ago" in notes[1] and "times are of NVIDIA H200" in notes[1]
    with pytest.raises(InputError, match="rtx-4090"):
        report_of(tmp_path, [Made("lora", 1)], market=market, gpu="rtx-4091")


def test_what_is_missing_is_a_dash_with_its_reason_and_never_zero(tmp_path: Path) -> None:
    cells = [Made("base", gpu=None, general=None), Made("lora", 1, gpu=None, planned=False)]
    report = report_of(tmp_path, cells)
    for key, reason in {
        "energy": "no energy counter",
        "rent_measured": "CPU",
        "needed_planned": "no plan",
        "epoch_planned": "not planned for CPUs",
        "forgetting": "no base was measured",
    }.items():
        found = value(report, key, "lora")
        assert (found.text, found.mean) == ("-", None)
        assert reason in found.missing
    assert value(report, "trainable", "base").missing == "the base is not trained"
    assert all(bool(found.missing) == (found.text == "-") for row in report.table for found in row.values)


def test_a_method_that_ran_out_of_memory_keeps_its_plan_and_says_so(tmp_path: Path) -> None:
    cells = [Made("lora", 1), Made("full", 1, None, status="out_of_memory", reason="2 GiB too much", peak_mib=90_000)]
    report = report_of(tmp_path, cells)
    assert value(report, "needed_planned", "full").mean is not None
    assert value(report, "peak_measured", "full").missing == "full ran out of memory"
    text = report_text(report)
    assert re.search(r"full-seed1 ran out of memory; planned [\d.]+ GiB of [\d.]+ GiB; 2 GiB too much", text)


def test_cells_that_differ_in_what_must_be_equal_are_refused_with_every_reason(tmp_path: Path) -> None:
    other = Made("full", 1, gpu="NVIDIA A100-SXM4-80GB", model="/models/another", steps=50, rows=150, task="reviews")
    other = replace(other, recipe={"data": {"name": "imdb", "max_length": 99}}, fingerprint="e" * 64)
    given = refused(tmp_path, [Made("lora", 1), other])
    for reason in (
        "model: another (full-seed1) against reader-16m (lora-seed1)",
        "tokens a row may have (data.max_length): 99 (full-seed1) against 1024 (lora-seed1)",
        "optimizer steps: 50 (full-seed1) against 60 (lora-seed1)",
        "machine (times and memory would be compared): NVIDIA A100",
        "task: reviews (full-seed1) against imdb (lora-seed1)",
        "test rows asked: 150 (full-seed1) against 200 (lora-seed1)",
        "test rows: lora-seed1 and full-seed1 were asked different ones (50 rows apart)",
        "training tokens: the audits of full-seed1 and lora-seed1 have other fingerprints",
    ):
        assert reason in given


@pytest.mark.parametrize(
    "recipe",
    [
        {"lora": {"r": 64}},
        {"train": {"learning_rate": 1e-3}},
        {"model": {"name": "/models/reader-16m", "dtype": "float32"}},
        {"quant": {"bnb_4bit_quant_type": "fp4"}},
        {"train": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}},
    ],
    ids=["rank", "rate", "precision", "quantisation", "the same rows a step in other parts"],
)
def test_what_is_compared_on_purpose_may_differ(tmp_path: Path, recipe: dict[str, object]) -> None:
    report = report_of(tmp_path, [Made("full", 1), Made("lora", 1, recipe=recipe)])
    assert len(report.pairs) == 1


def test_training_options_may_differ_only_where_they_are_swept(tmp_path: Path) -> None:
    decayed = Made("lora", 1, recipe={"train": {"weight_decay": 0.1}})
    given = refused(tmp_path / "a", [Made("full", 1), decayed])
    assert "train.weight_decay: 0.0 (full-seed1) against 0.1 (lora-seed1)" in given
    swept = replace(decayed, variant="lora train.weight_decay=0.1", overrides={"train.weight_decay": 0.1})
    report = report_of(tmp_path / "b", [Made("lora", 1), swept])
    assert [variant.label for variant in report.variants] == ["LoRA", "LoRA weight_decay=0.1"]


@pytest.mark.parametrize(
    ("name", "equal"),
    [("/moved/reader-16m", True), ("models/reader-16m", True), ("a/other", False), ("./reader-17m", False)],
)
def test_a_models_folder_may_have_moved(tmp_path: Path, name: str, equal: bool) -> None:
    cells = [Made("full", 1), Made("lora", 1, model=name)]
    if equal:
        report_of(tmp_path, cells)
    else:
        assert "- model: reader-16m (full-seed1) against" in refused(tmp_path, cells)


def test_models_of_two_owners_are_two_models(tmp_path: Path) -> None:
    assert "owner: one (full-seed1) against two" in refused(
        tmp_path, [Made("full", 1, model="one/reader"), Made("lora", 1, model="two/reader")]
    )


def test_other_rows_a_step_are_refused(tmp_path: Path) -> None:
    recipe = {"train": {"per_device_train_batch_size": 8}}
    assert "rows an optimizer step: 16" in refused(tmp_path, [Made("full", 1), Made("lora", 1, recipe=recipe)])


def test_other_tokens_in_one_step_of_one_seed_are_refused(tmp_path: Path) -> None:
    write_cells(tmp_path, [Made("full", 1), Made("lora", 1), Made("lora", 2)])
    metrics = tmp_path / "cells" / "lora-seed1" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[7]["targets"] += 1
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError) as caught:
        build_report(read_cells([tmp_path]), title="t", market=MARKET, search=None, notes=[])
    assert "step 8 of lora-seed1" in caught.value.given
    assert caught.value.given.count("\n    - ") == 1


def test_the_same_seed_twice_with_other_scores_is_refused_and_with_the_same_is_one(tmp_path: Path) -> None:
    write_cells(tmp_path / "a", [Made("base"), Made("lora", 1)])
    write_cells(tmp_path / "b", [Made("base"), Made("qlora", 1)])
    cells = read_cells([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert len(cells) == 4
    report = build_report(cells, title="t", market=MARKET, search=None, notes=[])
    assert [variant.name for variant in report.variants] == ["lora", "qlora", "base"]
    assert any("counted once" in note for note in report.notes)
    write_cells(tmp_path / "c", [Made("lora", 1, 0.5)])
    with pytest.raises(InputError, match="there twice"):
        build_report(read_cells([tmp_path / "a", tmp_path / "c"]), title="t", market=MARKET, search=None, notes=[])


def test_ordinary_runs_become_cells_named_by_what_sets_them_apart(tmp_path: Path) -> None:
    for rank in (8, 16):
        folder = tmp_path / f"run{rank}"
        write_cell(folder, Made("lora", 1, 0.9, recipe={"lora": {"r": rank}}))
        cell = json.loads((folder / "cell.json").read_text())
        (folder / "eval-imdb.json").write_text(json.dumps(cell["result"]))
        (folder / "eval-general.json").write_text(json.dumps(cell["general"]))
        (folder / "cell.json").unlink()
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(b"x" * 1000)
    cells = read_cells([tmp_path / "run16", tmp_path / "run8"])
    assert [cell.record.variant for cell in cells] == ["lora lora.r=16", "lora lora.r=8"]
    report = build_report(cells, title="t", market=MARKET, search=None, notes=[])
    assert [variant.label for variant in report.variants] == ["LoRA r=8", "LoRA r=16"]
    assert value(report, "result_bytes", "lora lora.r=8").mean == 1000


def test_a_federation_is_no_run_and_is_told_apart_from_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"federation": "x", "transport": "simulated", "rounds": []}))
    with pytest.raises(InputError, match="is a federation, whose rows lie at its sites"):
        read_cells([tmp_path])


def test_rent_and_energy_count_every_gpu_that_trained_together(tmp_path: Path) -> None:
    alone = report_of(tmp_path / "alone", [Made("lora", 1)])
    write_cells(tmp_path / "four", [Made("lora", 1)])
    for path in (tmp_path / "four").rglob("record.json"):
        content = json.loads(path.read_text())
        content["hardware"]["processes"] = 4
        path.write_text(json.dumps(content))
    four = build_report(read_cells([tmp_path / "four"]), title="t", market=MARKET, search=None, notes=[])
    for key in ("rent_measured", "energy"):
        assert value(four, key, "lora").mean == pytest.approx(4 * value(alone, key, "lora").mean)
    with pytest.raises(InputError, match="rows an optimizer step"):
        read = read_cells([tmp_path / "alone", tmp_path / "four"])
        build_report(read, title="t", market=MARKET, search=None, notes=[])


def test_a_run_without_an_evaluation_says_how_to_make_one(tmp_path: Path) -> None:
    write_cell(tmp_path / "run", Made("lora", 1))
    (tmp_path / "run" / "cell.json").unlink()
    with pytest.raises(InputError) as caught:
        read_cells([tmp_path / "run"])
    assert "no evaluation" in caught.value.given
    assert "thriftune eval" in caught.value.do


@pytest.mark.parametrize("name", ["nothing", "there is no such folder"])
def test_a_folder_without_records_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="holds no record"):
        read_cells([tmp_path / name])


def test_half_a_last_step_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    write_cells(tmp_path, [Made("lora", 1)])
    metrics = tmp_path / "cells" / "lora-seed1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    assert len(read_cells([tmp_path])[0].steps) == 59
    metrics.write_text("nonsense\n" + metrics.read_text())
    with pytest.raises(InputError, match="line 1 is not a step"):
        read_cells([tmp_path])


def test_a_cell_that_was_never_scored_is_a_line_of_its_own(tmp_path: Path) -> None:
    write_cells(tmp_path, [Made("lora", 1), Made("lora", 2)])
    (tmp_path / "cells" / "lora-seed2" / "cell.json").unlink()
    report = build_report(read_cells([tmp_path]), title="t", market=MARKET, search=None, notes=[])
    assert "lora-seed2 failed; planned" in report_text(report)
    assert "stopped before it was scored" in report_text(report)
    assert value(report, "score", "lora").by_seed == {"1": 0.9}


def test_pairs_are_tested_seed_by_seed_and_corrected(tmp_path: Path) -> None:
    report = report_of(tmp_path, usual(rows=1000))
    pairs = {(pair.first, pair.second): pair for pair in report.pairs}
    assert len(pairs) == 6
    equal, apart = pairs["full", "lora"], pairs["lora", "qlora"]
    assert (equal.seeds, equal.rows) == (["1", "2", "3"], 1000)
    assert not equal.shown and apart.shown
    assert apart.difference == pytest.approx(0.06, abs=0.005)
    assert apart.first_better > apart.second_better
    assert apart.low is not None and apart.high is not None and 0 < apart.low < 0.06 < apart.high
    assert all(pair.adjusted_p_value >= pair.p_value for pair in report.pairs)  # type: ignore[operator]
    assert pairs["lora", "base"].seeds == ["1", "2", "3"]


def test_no_interval_of_a_difference_of_shares_goes_beyond_all_of_them(tmp_path: Path) -> None:
    apart = {1: (0.95, 0.5), 2: (0.5, 0.95)}
    cells = [
        Made(method, seed, accuracy)
        for seed, both in apart.items()
        for method, accuracy in zip(("lora", "qlora"), both, strict=True)
    ]
    (pair,) = report_of(tmp_path, cells).pairs
    assert (pair.low, pair.high) == (-1.0, 1.0) and not pair.shown


def test_without_answers_nothing_is_tested_and_that_is_said(tmp_path: Path) -> None:
    write_cells(tmp_path, usual())
    for answers in tmp_path.rglob("eval-imdb.jsonl"):
        answers.unlink()
    report = build_report(read_cells([tmp_path]), title="t", market=MARKET, search=None, notes=[])
    assert all(pair.p_value is None and pair.test.startswith("not tested") for pair in report.pairs)
    assert any("answers of" in note for note in report.notes)
    assert "not tested against" in report.verdict
    assert report.patterns == [] and report.examples == []


def test_patterns_count_every_row_once_and_examples_differ(tmp_path: Path) -> None:
    report = report_of(tmp_path, usual(rows=500))
    assert sum(pattern.rows for pattern in report.patterns) == 500
    assert len(report.examples) == 10
    for example in report.examples:
        trained = [answer.correct for answer in example.answers if answer.variant != "base"]
        assert len(set(trained)) == 2


def test_perplexity_is_compared_by_its_logarithm_and_lower_is_better(tmp_path: Path) -> None:
    levels = {"base": 20.0, "full": 11.0, "lora": 11.0, "qlora": 11.6}
    cells = [replace(made, perplexity=levels[made.method], task="perplexity", rows=100) for made in usual()]
    report = report_of(tmp_path, cells)
    assert not report.higher_is_better and not report.as_percent
    pair = next(pair for pair in report.pairs if (pair.first, pair.second) == ("lora", "qlora"))
    assert pair.shown and pair.difference is not None and pair.difference < 0
    assert pair.first_better > pair.second_better
    assert "nats a token" in report_text(report)
    assert report.verdict.startswith("Take LoRA: no difference from full shown")


def test_the_terminals_text_has_at_most_100_columns(tmp_path: Path) -> None:
    many = [Made("lora", seed, variant=f"lora train.learning_rate={rate}") for rate in range(9) for seed in (1, 2)]
    for folder, cells in (("a", usual()), ("b", many)):
        lines = report_text(report_of(tmp_path / folder, cells)).splitlines()
        assert max(map(len, lines)) <= 100
        assert any("Accuracy" in line for line in lines)


def test_the_three_files_say_the_same(tmp_path: Path) -> None:
    search = {
        "metric": "accuracy",
        "rows": 50,
        "methods": {
            "lora": {
                "chosen": 2e-4,
                "tried": [
                    {"learning_rate": 2e-4, "value": 0.91, "low": 0.8, "high": 0.95},
                    {"learning_rate": 1e-2, "value": None, "reason": "the loss became NaN"},
                ],
            }
        },
    }
    report = report_of(tmp_path, usual(), search=search, notes=["prices are old"])
    cells = read_cells([tmp_path])
    write_report(report, cells, tmp_path)
    assert read_record(tmp_path / "report.json", ReportRecord) == report
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for text in ("prices are old", "91.0", "the loss became NaN", "thriftune train", "2.13.0", "method: qlora"):
        assert text in page, text
        assert text in markdown.replace("\\", ""), text
    assert "weights, planned" in markdown and "lora-seed1 |" in markdown
    for row in report.table:
        assert row.label in page and row.label in markdown
        for found in row.values:
            assert found.text == "-" or (found.text in page and found.text in markdown.replace("\\", ""))
    for cell in report.cells:
        assert cell.value is not None
        low, high = wilson(round(cell.value * 600), 600, Z_95)
        words = f"{cell.name}: {100 * cell.value:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
        assert words in page, "each cell has Wilson's interval of its own"
        assert cell.variant == "base" or words in markdown
    assert "140 GiB" in page and "150000000000" not in page
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_texts_of_models_and_people_are_no_markup(tmp_path: Path) -> None:
    cells = [replace(made, answer=MARKUP) for made in usual()]
    cells.append(Made("full", 9, None, status="failed", reason=MARKUP))
    report = report_of(tmp_path, cells, title=MARKUP, notes=[MARKUP])
    write_report(report, [], tmp_path)
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    outside = re.sub(r"(?ms)^(`{3,}).*?^\1$", "", markdown)
    assert "<script" not in outside.replace("\\<", "")
    assert "**bold**" not in outside
    assert "http" not in re.sub(r'(xmlns|href)="[^"]*"', "", page)


def test_a_curve_keeps_the_mean_of_every_step(tmp_path: Path) -> None:
    write_cells(tmp_path, [Made("lora", 1, steps=1000)])
    steps = read_cells([tmp_path])[0].steps
    tokens, losses, most = curve(steps)
    assert len(tokens) == len(losses) <= CURVE_POINTS
    assert most == -(-1000 // CURVE_POINTS)
    assert tokens[-1] == steps[-1].tokens_seen
    assert losses[0] == pytest.approx(sum(step.loss for step in steps[:most]) / most)
    again = [*steps[:500], *steps[300:]]  # a run that went back to a checkpoint
    assert curve(again) == (tokens, losses, most)


def test_smoothing_keeps_places_and_a_straight_line() -> None:
    points = [(number, 2.0) for number in range(30)]
    assert smoothed(points) == points


def test_the_front_has_no_method_that_another_makes_needless(tmp_path: Path) -> None:
    report = report_of(tmp_path, usual(rows=1000))
    spots = _spots(report, {row.key: row for row in report.table}, "peak_measured")
    assert front_of(report, spots) == {"lora", "qlora"}


def test_equal_points_of_a_metric_where_less_is_better_do_not_put_each_other_off_the_front(tmp_path: Path) -> None:
    cells = [Made(method, 1, None, perplexity=9.0, peak_mib=500, task="perplexity") for method in ("lora", "qlora")]
    report = report_of(tmp_path, cells)
    assert not report.higher_is_better
    made = _spots(report, {row.key: row for row in report.table}, "peak_measured")
    spots = [replace(spot, y=9.0) for spot in made]
    assert front_of(report, spots) == {"lora", "qlora"}


def test_the_front_never_turns_back_where_two_need_about_the_same(tmp_path: Path) -> None:
    cells = [Made("lora", 1, 0.92, peak_mib=489), Made("qlora", 1, 0.91, peak_mib=496), Made("full", 1, 0.92)]
    report = report_of(tmp_path, cells)
    assert not any(pair.shown for pair in report.pairs)
    spots = _spots(report, {row.key: row for row in report.table}, "peak_measured")
    assert front_of(report, spots) == {"lora"}


def test_letters_in_a_plot_are_explained_and_a_front_of_one_is_named(tmp_path: Path) -> None:
    report = report_of(tmp_path / "usual", usual(rows=1000))
    seen = agreement_figure(report, looks(report))
    assert seen is not None and "A: " not in seen.caption and ">LoRA<" in seen.narrow
    by_memory = cost_figures(report, looks(report))[0]
    assert "The line joins what nothing else beats" in by_memory.caption and 'class="front"' in by_memory.wide
    cells = [Made("lora", 1, variant=f"lora lora.r={rank}", peak_mib=100 * rank) for rank in range(1, 7)]
    report = report_of(tmp_path / "six", cells)
    seen = agreement_figure(report, looks(report))
    assert seen is not None and "A: LoRA r=1, B: LoRA r=2, " in seen.caption and "F: LoRA r=6." in seen.caption
    assert ">F<" in seen.wide and ">F<" in seen.narrow and "LoRA r=6" not in seen.wide.partition("</desc>")[2]
    by_memory = cost_figures(report, looks(report))[0]
    assert "Nothing else beats LoRA r=1: no other" in by_memory.caption and 'class="front"' not in by_memory.wide


def test_every_variant_looks_different_without_colour(tmp_path: Path) -> None:
    cells = [Made("lora", 1, variant=f"lora lora.r={rank}") for rank in range(1, 13)]
    found = looks(report_of(tmp_path, cells))
    assert len({(look.tag, look.shape, look.dash, look.colour) for look in found.values()}) == 12
    assert len({look.tag for look in found.values()}) == 12


def test_labels_are_put_apart_and_ticks_are_round() -> None:
    placed = apart([10, 11, 12, 200], 14, 0, 205)
    assert all(later - earlier >= 14 for earlier, later in pairwise(placed))
    assert max(placed) <= 205
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(540, 1050, 6) == [600, 700, 800, 900, 1000]


def test_a_search_of_another_shape_is_shown_as_it_is() -> None:
    found = search_table({"lora": [1, 2, 3]})
    assert found is not None
    assert json.loads(found.text) == {"lora": [1, 2, 3]}
    assert search_table(None) is None


def test_the_ranks_of_a_run_that_was_cut_are_drawn_with_the_jumps_of_the_loss(tmp_path: Path) -> None:
    write_cells(tmp_path, usual())
    path = tmp_path / "cells" / "lora-seed1" / "record.json"
    record = json.loads(path.read_text())
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    names = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in kinds]
    cuts = [
        RankCut(
            step=step,
            share=share,
            ranks=dict(zip(names, ranks, strict=True)),
            loss_before=1.5,
            loss_after=1.5 + step / 1000,
            parameters_before=9000,
            parameters_after=5000,
            held_bytes_before=9,
            held_bytes_after=5,
            cut_s=0.1,
        ).model_dump()
        for step, share, ranks in ((10, 0.7, [64, 32, 48, 8, 16, 8]), (20, 0.5, [48, 0, 48, 0, 16, 8]))
    ]
    recipe = record["recipe"] | {"method": "dynamic", "dynamic": {"r_start": 64}}
    events = [RankCut.model_validate(cut).words for cut in cuts]
    path.write_text(json.dumps(record | {"cuts": cuts, "recipe": recipe, "events": [*events, "a peer left", "slow"]}))
    other = tmp_path / "cells" / "lora-seed2" / "record.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"events": ["slow", "slow"]}))
    report = build_report(read_cells([tmp_path]), title="x", market=MARKET, search=None, notes=[])
    told = [note for note in report.notes if note.startswith("lora-seed")]
    assert told == ["lora-seed1: a peer left", "lora-seed1 and lora-seed2: slow"], (
        "cuts are drawn, the rest is told once"
    )
    write_report(report, read_cells([tmp_path]), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    figure = page[page.index("Ranks of LoRA, seed 1") :]
    wide = figure[figure.index('<svg class="plot wide"') : figure.index('<svg class="plot narrow"')]
    assert wide.count("<rect") == 12 and wide.count('class="rank0"') == 2 and wide.count('class="rank8"') == 1
    assert "model.layers.1.self_attn.q_proj: rank 48" in wide
    assert "loss 1.5000 → 1.5100 (+0.0100)" in wide and "loss 1.5000 → 1.5200 (+0.0200)" in wide
    assert "down_proj" in wide and "of 64" in figure
    plain = build_report(
        read_cells([write_cells(tmp_path / "plain", usual())]), title="x", market=MARKET, search=None, notes=[]
    )
    assert all(cell.cuts == [] for cell in plain.cells)
