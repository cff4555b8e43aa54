"""The verdict's sentence: what is taken, and that chance ranks nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import MARKET, report_of, value

from cell_folders import Made, usual, write_cells
from thriftune.records import ReportRecord
from thriftune.report import build_report, read_cells
from thriftune.report.page import report_page


def test_of_equals_the_faster_is_taken_and_the_rest_is_said(tmp_path: Path) -> None:
    report = report_of(tmp_path, usual(rows=1000))
    assert report.chosen == "lora"
    assert report.verdict == (
        "Take LoRA: no difference from full shown (93.0 against 93.0 %), better than QLoRA and the base (87.0 and "
        "55.0 %); 19 % less memory and 1.3 x the speed of full; QLoRA needs the least memory (560 MiB against 810 MiB)."
    )
    assert report.certainty[0] == "1,000 test rows; 3 seeds a method."
    assert any("No difference shown between full and LoRA" in line for line in report.certainty)


def test_a_lead_by_chance_does_not_win(tmp_path: Path) -> None:
    """QLoRA is ahead by one row of 200 and slower: no reason to take it."""
    cells = [Made("lora", 1, 0.90, train_s=100), Made("qlora", 1, 0.905, train_s=150)]
    report = report_of(tmp_path, cells)
    assert report.chosen == "lora"
    assert "no difference from QLoRA shown (90.0 against 90.5 %)" in report.verdict
    assert any("other seeds could rank them otherwise" in line for line in report.certainty)


def test_a_lead_that_is_shown_wins_over_speed_and_memory(tmp_path: Path) -> None:
    cells = [Made("full", seed, 0.95, rows=1000, train_s=300, peak_mib=2000) for seed in (1, 2, 3)]
    cells += [Made("lora", seed, 0.85, rows=1000, train_s=100, peak_mib=500) for seed in (1, 2, 3)]
    report = report_of(tmp_path, cells)
    assert report.verdict == (
        "Take full: better than LoRA (95.0 against 85.0 %); LoRA needs the least memory and time (500 MiB against "
        "1.95 GiB, 1 min 40 s against 5 min 00 s)."
    )


def test_times_that_overlap_do_not_decide_and_memory_does(tmp_path: Path) -> None:
    cells = [Made("full", seed, train_s=100 + 30 * seed, peak_mib=1000) for seed in (1, 2)]
    cells += [Made("lora", seed, train_s=110 + 30 * seed, peak_mib=600) for seed in (1, 2)]
    report = report_of(tmp_path, cells)
    assert report.chosen == "lora"
    assert "40 % less memory than full" in report.verdict
    assert "speed" not in report.verdict


def test_many_unshown_differences_are_told_shortly_and_intervals_beside_them_explained(tmp_path: Path) -> None:
    cells = [Made("lora", seed, 0.80 + 0.01 * rank, variant=f"lora lora.r={rank}", train_s=200 - rank)
             for rank in range(12) for seed in (1, 2)]  # fmt: skip
    report = report_of(tmp_path, cells)
    unshown = [line for line in report.certainty if line.startswith("No difference shown")]
    assert len(unshown) == 4 and any(re.fullmatch(r"Nor is one shown between it and \d more: .*", line)
                                     for line in report.certainty)  # fmt: skip
    for line in unshown:
        low, high = (float(end) for end in re.search(r"between ([-+][\d.]+) and ([-+][\d.]+) points", line).groups())
        assert (low > 0 or high < 0) == ("Alone that would count; of 66 pairs" in line)
    assert any("Alone that would count" in line for line in unshown)


def test_times_of_cells_that_shared_a_device_decide_nothing(tmp_path: Path) -> None:
    cells = [Made("full", seed, train_s=300, peak_mib=600) for seed in (1, 2)]
    cells += [Made("lora", seed, train_s=100, peak_mib=1000) for seed in (1, 2)]
    assert report_of(tmp_path / "alone", cells).chosen == "lora"
    beside = [replace(made, at_once=4, sharing=1) for made in cells]
    report = report_of(tmp_path / "beside", beside)
    assert report.chosen == "full" and "fast" not in report.verdict and "speed" not in report.verdict
    assert any("do not compare methods" in note for note in report.notes)
    marked = {row.key for row in report.table if "does not compare methods" in row.note}
    assert {"train", "epoch_measured", "tokens_per_s", "rent_measured", "energy", "first_token"} <= marked
    assert not marked & {"epoch_planned", "rent_planned", "peak_measured", "score"}
    page = report_page(report)
    assert "by peak memory" in page and "by dollars" not in page
    own = report_of(tmp_path / "own", [replace(made, at_once=2) for made in cells])
    assert own.chosen == "lora" and any("each on a GPU of its own" in note for note in own.notes)


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        (0.70, "Keep the base: training made it worse (70.0 % with LoRA, 90.0 % without training)."),
        (0.90, "Keep the base: no difference from it shown for any method (the best has 90.0 % with LoRA, 90.0 %"),
    ],
)
def test_nothing_beats_the_base(tmp_path: Path, tuned: float, words: str) -> None:
    cells = [Made("base", accuracy=0.9, rows=400), *(Made("lora", seed, tuned, rows=400) for seed in (1, 2))]
    report = report_of(tmp_path, cells)
    assert report.verdict.startswith(words)
    assert report.chosen == "base"


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([Made("base", accuracy=0.91)], "No verdict: only the base is scored (91.0 %)."),
        ([Made("lora", 1, 0.91)], "Take LoRA: the only method that was trained and scored (91.0 %)."),
        (
            [Made("full", 1, None, status="out_of_memory"), Made("lora", 1, None, status="refused")],
            "No verdict: full ran out of memory; LoRA would not fit by the plan.",
        ),
    ],
    ids=["base", "one", "none"],
)
def test_too_little_for_a_choice(tmp_path: Path, cells: list[Made], words: str) -> None:
    report = report_of(tmp_path, cells)
    assert report.verdict == words


def test_a_high_mean_of_wild_seeds_does_not_hide_a_method_that_beats_the_base(tmp_path: Path) -> None:
    cells = [Made("base", accuracy=0.8, rows=1000)]
    cells += [Made("full", seed, score, rows=1000) for seed, score in ((1, 0.99), (2, 0.80), (3, 0.99))]
    cells += [Made("lora", seed, 0.90 + 0.001 * seed, rows=1000, train_s=200) for seed in (1, 2, 3)]
    report = report_of(tmp_path, cells)
    assert report.chosen == "lora"
    assert "no difference from full shown (90.2 against 92.7 %)" in report.verdict


@pytest.mark.parametrize(("other", "chosen"), [(0.905, "lora"), (0.99, "qlora")])
def test_without_answers_only_intervals_that_do_not_overlap_decide(tmp_path: Path, other: float, chosen: str) -> None:
    write_cells(tmp_path, [Made("lora", 1, 0.9, train_s=100), Made("qlora", 1, other, train_s=200)])
    for answers in tmp_path.rglob("eval-imdb.jsonl"):
        answers.unlink()
    report = build_report(read_cells([tmp_path]), title="t", market=MARKET, search=None, notes=[])
    assert report.chosen == chosen
    assert "not tested against" in report.verdict


def test_without_answers_rows_and_seeds_still_count_each_for_itself(tmp_path: Path) -> None:
    """Two seeds that hardly differ are no reason to doubt what 200 rows show."""
    cells = [Made("base", accuracy=0.43), Made("qlora", 1, 0.84), Made("qlora", 2, 0.85)]
    write_cells(tmp_path, cells)
    with_answers = report_of(tmp_path, cells)
    for answers in tmp_path.rglob("eval-imdb.jsonl"):
        answers.unlink()
    report = build_report(read_cells([tmp_path]), title="t", market=MARKET, search=None, notes=[])
    assert report.chosen == with_answers.chosen == "qlora"
    without, known = value(report, "score", "qlora"), value(with_answers, "score", "qlora")
    assert without.high - without.low < 1.5 * (known.high - known.low)


def test_without_answers_an_overlap_is_no_finding_of_no_difference(tmp_path: Path) -> None:
    write_cells(tmp_path, [Made("base", accuracy=0.88), Made("lora", 1, 0.90)])
    for answers in tmp_path.rglob("eval-imdb.jsonl"):
        answers.unlink()
    report = build_report(read_cells([tmp_path]), title="t", market=MARKET, search=None, notes=[])
    assert report.verdict.startswith("Keep the base, or test further: no method's interval lies clear of its own")


def test_a_method_that_is_not_there_is_named(tmp_path: Path) -> None:
    cells = [*usual(seeds=(1, 2)), Made("full", 3, None, status="skipped")]
    gone = [replace(made, status="out_of_memory") if made.method == "full" else made for made in cells]
    report: ReportRecord = report_of(tmp_path, gone)
    assert report.verdict.startswith("Take LoRA: better than QLoRA and the base")
    assert report.verdict.endswith("; full ran out of memory.")


def test_many_variants_do_not_make_a_long_sentence(tmp_path: Path) -> None:
    cells = [
        Made("lora", seed, 0.6 + 0.03 * rank, variant=f"lora lora.r={rank}", rows=600)
        for rank in range(10)
        for seed in (1, 2)
    ]
    report = report_of(tmp_path, cells)
    assert len(report.verdict) < 300
    assert "others" in report.verdict
