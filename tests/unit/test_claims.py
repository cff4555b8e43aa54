"""docs/claims.md says what benchmarks/claims/run.py computes: its tables line by line, every number of its prose."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "claims" / "run.py"
PAGE = REPOSITORY / "docs" / "claims.md"
AGAIN = "run `python benchmarks/claims/run.py --write` and read the prose again"

# What the article says, section by section; prose may quote it.
QUOTED = {
    1: "70B 8 80 GB 20 h $640",
    2: "8B r=16 4.2M 0.05 %",
    3: "18 GB 45 min $0.80 $12",
    4: "70B 8.4M 24 GB 40 GB 6 h $30",
    5: "140 GB 35 GB",
    6: "8,388,608 4,295,004,160",
    7: "0.1 % 99.9 %",
    8: "30 %",
    9: "1,000 rows 12 min 16 GB",
    10: "120B 24 GB",
    11: "95 %",
}
# Numbers inside names, and units of this page: no claims.
NAMES = re.compile(
    r"Llama [23](\.1)? \d+B|gpt-oss-120b|GSM8K|RTX 4090|a 4090|A100 (40|80) GB|A100s?|H200|NF4|r=\d+|\d+-bit|\d+ bits|"
    r"\b(7|8|70|123)B|2\^\d+|10\^9|float32|claim \d|paged_adamw_8bit|gsm8k-8b|16 M-parameter|A6000"
)
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?")
GENERAL = {"16", "8"}  # bytes of the states and cards: in the claim, or in a row's "how"


def numbers(text: str) -> set[str]:
    return {found.rstrip(",") for found in NUMBER.findall(NAMES.sub(" ", " ".join(text.split())))}


def sections(text: str, heading: str) -> dict[int, str]:
    parts = re.split(heading, text)
    return {int(number): body for number, body in zip(parts[1::2], parts[2::2], strict=True)}


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def computed() -> dict[int, str]:
    """What the script prints; it needs no torch and less than two seconds of a processor."""
    checked = (
        "import runpy, sys, time; sys.argv = ['run.py']; "
        f"sys.path.insert(0, {str(SCRIPT.parent)!r}); runpy.run_path({str(SCRIPT)!r}, run_name='__main__'); "
        "assert 'torch' not in sys.modules; print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.splitlines()[-1]) < 2
    return sections(done.stdout, r"(?m)^(\d+)\.$")


@pytest.fixture(scope="module")
def page() -> dict[int, str]:
    return sections(PAGE.read_text(encoding="utf-8"), r"(?m)^## (\d+)\. ")


def test_the_page_and_the_script_have_the_same_sections(computed: dict[int, str], page: dict[int, str]) -> None:
    assert list(page) == list(computed) == list(QUOTED)


@pytest.mark.parametrize("number", QUOTED)
def test_tables_are_what_the_script_computes(number: int, computed: dict[int, str], page: dict[int, str]) -> None:
    assert table(page[number]) == table(computed[number]), AGAIN


@pytest.mark.parametrize("number", QUOTED)
def test_numbers_of_the_prose_are_in_the_table_or_the_claim(
    number: int, computed: dict[int, str], page: dict[int, str]
) -> None:
    prose = re.sub(r"(?m)^\|.*$", "", page[number])
    known = numbers(computed[number]) | {word.strip("$M%Bh") for word in QUOTED[number].split()} | GENERAL
    assert numbers(prose) - known == set(), AGAIN


def test_numbers_of_the_summary_are_in_their_sections(computed: dict[int, str]) -> None:
    opening = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    rows = re.findall(r"(?m)^\| (\d+) \| (.*) \| (.*) \|$", opening)
    assert [int(number) for number, _, _ in rows] == list(QUOTED)
    for number, claim, verdict in rows:
        known = {word.strip("$M%Bh") for word in QUOTED[int(number)].split()} | GENERAL
        assert numbers(claim) - known == set()
        assert numbers(verdict) - known - numbers(computed[int(number)]) == set(), AGAIN


def test_a_number_that_drifts_is_found(page: dict[int, str]) -> None:
    assert numbers("it is 39.5 GB, 8,388,608 and 42.7, on an RTX 4090") == {"39.5", "8,388,608", "42.7"}
    assert "39.5 GB" in page[5]


def test_the_page_is_plain_text() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.isascii()
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
