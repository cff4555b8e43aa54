"""The demo: what it compares, what it replaces, which answers it shows. Its whole length is `make demo`."""

from __future__ import annotations

import pytest

from command_line import runner
from thriftune import demo


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
