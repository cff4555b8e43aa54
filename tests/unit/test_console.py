"""What a person sees while a run goes on, on a terminal and in a file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from thriftune.console import ProgressLine, print_audit
from thriftune.records import StepMetrics

MIB = 1024**2


def step(number: int, **changes) -> StepMetrics:
    values = {
        "step": number, "epoch": 0.5, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-4, "targets": 10,
        "tokens": 100, "tokens_seen": 100 * number, "step_s": 0.5, "tokens_per_s": 12_345.6, "memory_bytes": 300 * MIB,
        "peak_bytes": 400 * MIB,
    }  # fmt: skip
    return StepMetrics(**{**values, **changes})


def plain() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=60), text


def shown(every: int, steps: list[StepMetrics], total: int, first: int = 0, label: str = "") -> list[str]:
    console, text = plain()
    line = ProgressLine(console, every, label)
    line.start(first, total)
    for metrics in steps:
        line.step(metrics)
    line.end()
    return text.getvalue().splitlines()


def test_a_line_says_where_the_run_is():
    (line,) = shown(10, [step(1)], 40)
    assert line.startswith("step 1/40  loss 2.5000  12.3 k tokens/s  memory 300 MiB (peak 400 MiB)  ")
    assert line.endswith(" left")


def test_a_run_beside_others_says_its_name_in_every_line_and_leaves_the_terminal_to_all():
    (line,) = shown(10, [step(1)], 40, label="lora-seed42")
    assert line.startswith("lora-seed42: step 1/40  loss 2.5000")
    text = io.StringIO()
    beside = ProgressLine(Console(file=text, force_terminal=True, width=200), 10, "lora-seed42")
    beside.start(0, 40)
    beside.step(step(1))
    beside.step(step(2))
    beside.event("out of memory")
    beside.saved(Path("run"))
    beside.end()
    assert text.getvalue().count("lora-seed42: ") == 3 and "\x1b[?25l" not in text.getvalue(), "no cursor is hidden"


def test_lines_come_first_last_and_every_so_many_steps():
    lines = shown(10, [step(number) for number in range(1, 26)], 25)
    assert [line.split("  ")[0] for line in lines] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]
    lines = shown(10, [step(number) for number in range(14, 18)], 25, first=13)
    assert [line.split("  ")[0] for line in lines] == ["step 14/25"]


def test_an_evaluation_is_always_shown():
    lines = shown(10, [step(1), step(2), step(3, eval_loss=1.25)], 40)
    assert len(lines) == 2 and "loss 2.5000  eval loss 1.2500" in lines[1]


def test_power_is_energy_over_time():
    lines = shown(1, [step(1, energy_j=100.0), step(2, energy_j=250.0)], 40)
    assert "100 J" in lines[0] and "300 W" in lines[1]


def test_power_is_of_the_time_since_the_meter_was_read_last():
    """It is read a few times a second; steps between two readings have the energy of the first."""
    readings = [100.0, 100.0, 100.0, 250.0, 250.0]
    lines = shown(1, [step(number, energy_j=energy) for number, energy in enumerate(readings, 1)], 40)
    assert ["100 J" in line for line in lines] == [True, True, True, False, False]
    assert all("100 W" in line for line in lines[3:]), "150 J in three steps of half a second"


def test_the_time_left_falls_to_nothing():
    assert shown(1, [step(40)], 40)[0].endswith("  0.00 s left")


def test_one_line_is_rewritten_on_a_terminal():
    text = io.StringIO()
    line = ProgressLine(Console(file=text, force_terminal=True, width=200), 10, "")
    line.start(0, 100)
    for number in range(1, 6):
        line.step(step(number))
    line.end()
    assert "step 1/100" in text.getvalue() and "\x1b[?25h" in text.getvalue(), "the cursor is shown again"


def test_an_end_without_a_start_and_twice_is_fine():
    console, _ = plain()
    line = ProgressLine(console, 1, "")
    line.end()
    line.start(0, 1)
    line.end()
    line.end()


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/x]", "a" * 300, "\\[", ":smile:"])
def test_texts_are_printed_as_they_are(text):
    console, printed = plain()
    line = ProgressLine(console, 1, "")
    line.event(text)
    print_audit(console, [("warn", text)], [(text, False), (text, True)])
    first, warning, row, legend = printed.getvalue().splitlines()
    assert first == text and warning == f"WARN  {text}"
    assert row == f"      first row: {text}>>>{text}<<<" and legend == "      (trained: >>> <<<)"


def test_colour_marks_what_is_trained_where_there_is_colour():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system="standard", width=80)
    print_audit(console, [("ok", "fine"), ("note", "so")], [("asked", False), ("answered", True)])
    assert ">>>" not in text.getvalue() and "green" in text.getvalue()
    no_colour = io.StringIO()
    print_audit(Console(file=no_colour, force_terminal=True, no_color=True), [], [("answered", True)])
    assert ">>>answered<<<" in no_colour.getvalue()


def test_no_row_is_shown_when_there_is_none():
    console, text = plain()
    print_audit(console, [("ok", "fine")], None)
    assert text.getvalue() == "ok    fine\n"
