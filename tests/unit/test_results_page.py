"""docs/results.md says what its records say, and is not written from records that are not whole."""

import sys
from pathlib import Path

import pytest
import yaml
from test_report import report_of

from cell_folders import Made, write_cells
from thriftune.compare.pages import report_folders
from thriftune.records import write_record

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "benchmarks" / "imdb_reader"))

from keep import at_once, keep, restore  # noqa: E402
from write_results import PAGE, RESULTS, against, claims, page, pair_of, value, within  # noqa: E402

SCORES = {"full": 0.93, "lora": 0.925, "qlora": 0.90}


def cells(**changes: float) -> list[Made]:
    made = [Made("base", accuracy=0.5, rows=2000)]
    scores = {**SCORES, **changes}
    return made + [Made(method, seed, score, rows=2000) for method, score in scores.items() for seed in (1, 2, 3)]


@pytest.mark.skipif(not (RESULTS / "imdb" / "report.json").is_file(), reason="benchmarks/imdb_reader has not ended yet")
def test_the_page_is_what_the_records_give():
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS), (
        "run `python benchmarks/imdb_reader/write_results.py --write`"
    )


def test_claims_are_told_with_their_certainty(tmp_path):
    report = report_of(tmp_path, cells())
    found = claims(report)
    assert len(found) == 5 and found[0][1] == "50.00 %" and "below 88 %" in found[0][2]
    assert "92" in found[2][0] and found[2][1].startswith("LoRA 92.5 %")
    assert against(value(report, "full", "score"), 80).startswith("above 80 %")
    assert against(value(report, "full", "score"), 93).startswith("not told apart from 93 %")
    came, sure = within(pair_of(report, "full", "qlora"))
    assert came == "full less QLoRA: +3.00 points" and sure.startswith("refuted") and "a difference is shown" in sure
    close = report_of(tmp_path / "close", cells(qlora=0.928))
    assert within(pair_of(close, "full", "qlora"))[1].startswith("shown")
    turned = pair_of(close, "qlora", "full")
    assert turned.difference == -(pair_of(close, "full", "qlora").difference or 0)
    assert (turned.low or 0) < (turned.difference or 0) < (turned.high or 0)


def test_a_page_is_made_of_whole_records_only(tmp_path):
    with pytest.raises(SystemExit, match="is not there"):
        page(tmp_path)
    for part, made in (("imdb", cells()), ("gsm8k", [one for one in cells() if one.seed in (None, 1)])):
        report = report_of(tmp_path / "made" / part, made)
        write_record(tmp_path / part / "report.json", report)
    text = page(tmp_path)
    whole = report_of(tmp_path / "whole", cells())
    assert f"**{whole.verdict}**" in text and all(line in text for line in whole.certainty)
    assert "| QLoRA is within 2 points of full | full less QLoRA: +3.00 points | refuted:" in text
    assert "| QLoRA | 90.0 % ± 0 | 88.7 to 91.1 % | 90.00, 90.00, 90.00 |" in text
    write_record(tmp_path / "imdb" / "report.json", report_of(tmp_path / "less", cells()[:-1]))
    with pytest.raises(SystemExit, match="not whole: qlora"):
        page(tmp_path)


def test_kept_records_make_the_same_report(tmp_path):
    folder = write_cells(tmp_path / "out", cells())
    there = {"model": {"name": "/tmp/b/reader"}, "data": {"name": "imdb", "path": "/tmp/b/imdb"}}
    asked = {"at_once": 3, "variants": {"base": there, "lora": there}}
    (folder / "compare.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    (folder / "cells" / "lora-seed1" / "adapter").mkdir()
    (folder / "cells" / "lora-seed1" / "adapter" / "weights").write_bytes(b"0" * 1000)
    before = report_folders([folder], folder, [])
    keep(folder, tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("weights"))
    assert at_once(tmp_path / "again") is None
    restore(tmp_path / "kept", tmp_path / "again", "/data/reader", "/data/imdb")
    restored = yaml.safe_load((tmp_path / "again" / "compare.yaml").read_text(encoding="utf-8"))
    here = {"model": {"name": "/data/reader"}, "data": {"name": "imdb", "path": "/data/imdb"}}
    assert restored == {**asked, "variants": {"base": here, "lora": here}} and at_once(tmp_path / "again") == 3
    after = report_folders([tmp_path / "again"], tmp_path / "again", [])
    assert (after.verdict, after.pairs, after.table) == (before.verdict, before.pairs, before.table)
    assert [cell.curve_loss for cell in after.cells] == [cell.curve_loss for cell in before.cells]
