"""The demo: what it compares, what it replaces, which answers it shows. Its whole length is `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import runner
from thriftune import demo

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys)


def test_it_compares_every_method_and_shows_answers_before_and_after(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "WORDS", (*demo.WORDS, "max_samples=40", "max_steps=3"))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "compare.yaml").write_text("of an earlier demo")
    (tmp_path / "demo" / "old.txt").write_text("of an earlier demo")
    shown = run("demo", "--limit", "8", "--json").ok().json
    assert [variant["method"] for variant in shown["report"]["variants"]] == ["full", "lora", "qlora", "base"]
    assert all(cell["status"] == "done" for cell in shown["report"]["cells"])
    assert len(shown["answers"]) == 3 and set(shown["answers"][0]) == {"prompt", "before", "after", "target"}
    assert (tmp_path / "demo" / "report.html").is_file() and not (tmp_path / "demo" / "old.txt").exists()
    assert shown["page"] == "demo/report.html" and shown["wall_s"] > 0


def test_answers_with_separators_of_lines_in_them_are_read_whole(tmp_path):
    """U+0085 and U+2028 stand in an answers file as they are; only the line feed separates its rows."""
    for name in ("before", "after"):
        rows = [{"prompt": "a\x85b", "answer": f"{name}\u2028{row}", "target": "c\u2029d"} for row in range(3)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    shown = demo._three_answers(tmp_path / "before", tmp_path / "after")
    assert [(row["before"], row["after"]) for row in shown] == [(f"before {row}", f"after {row}") for row in range(3)]


def test_a_folder_that_is_no_demo_is_not_replaced(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    run("demo", "-o", tmp_path).refused("no earlier demo")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_no_browser_is_asked_for_without_a_screen(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr(demo.webbrowser, "open", lambda address: asked.append(address) is None)
    assert not demo.open_page(tmp_path) and asked == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert demo.open_page(tmp_path) and asked == [(tmp_path / "report.html").resolve().as_uri()]


def test_the_record_of_the_demo_is_what_the_page_tells():
    """benchmarks/pocket/demo.py ran it twice, on two cores: under four minutes, above 90 %, the same table."""
    record = json.loads((REPOSITORY / "benchmarks/results/pocket/demo.json").read_text(encoding="utf-8"))
    page = (REPOSITORY / "docs/compare.md").read_text(encoding="utf-8")
    assert record["same_table"] and {"score", "interval", "forgetting"} <= set(record["compared_rows"])
    for run in record["runs"]:
        assert run["wall_s"] < 240
        values = {name.partition("-")[0]: cell["value"] for name, cell in run["cells"].items()}
        assert abs(values.pop("base") - 0.5) < 0.05 and set(values) == {"full", "lora", "qlora"}
        assert min(values.values()) > 0.9
        assert f"{run['wall_s']:.0f}" in page and f"{run['processor_s']:.0f}" in page
    for row in ("score", "interval"):
        assert f"| {' | '.join(record['scores'][row])} |" in page
