"""report.html in a real browser: no error, nothing asked of a network, nothing cut off, everything drawn.

The pictures are kept in the folder that THRIFTUNE_PICTURES names, to be looked at.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from browser import Browser, find_browser

from cell_folders import Made, usual, write_cells
from thriftune.catalog.gpus import built_in_gpus
from thriftune.catalog.prices import ElectricityPrice
from thriftune.catalog.rows import Price
from thriftune.plan.cost import Market
from thriftune.report import build_report, read_cells, write_report

MARKET = Market(
    gpus=list(built_in_gpus().values()),
    prices=[Price("h200", "Somewhere", "on-demand", 3.60, "its page", date(2026, 11, 1))],
    electricity=ElectricityPrice(0.2, "a bill", None),
    today=date(2026, 11, 24),
)
WIDTHS = {"desktop": 1280, "tablet": 760, "phone": 390, "small phone": 320}
LONG = "<b>markup</b> & " + "averylongwordwithoutaspace" * 20
SEARCH = {
    "metric": "accuracy",
    "split": "imdb train, 500 rows held out",
    "methods": {"lora": {"chosen": 2e-4, "tried": [{"learning_rate": 2e-4, "value": 0.91, "low": 0.88, "high": 0.94}]}},
}


def many() -> list[Made]:
    """Twelve variants with long names, one out of memory, and a base."""
    cells = [Made("base", accuracy=0.5)]
    for number in range(12):
        variant = f"lora lora.r={number} train.learning_rate=0.0002"
        cells += [
            Made("lora", seed, 0.80 + 0.01 * number, variant=variant, peak_mib=500 + 60 * number, train_s=90 + number)
            for seed in (1, 2)
        ]
    return [*cells, Made("full", 1, None, status="out_of_memory", reason=LONG, peak_mib=90_000)]


CASES = {
    "usual": usual(),
    "many": many(),
    "one": [Made("lora", 1)],
    "cpu": usual(seeds=(1,), gpu=None),
    "long": [replace(made, answer=LONG, reason=LONG) for made in usual()],
    "perplexity": [replace(made, perplexity=11.0, task="perplexity", rows=50) for made in usual()],
    "nothing": [Made("full", 1, None, status="out_of_memory", reason="no room", planned=False)],
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine: on Debian, apt-get install chromium")
    with Browser(program) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, cells in CASES.items():
        folder = write_cells(tmp_path_factory.mktemp(name), cells)
        title = LONG if name == "long" else f"Which method for {name}?"
        read = read_cells([folder])
        write_report(build_report(read, title=title, market=MARKET, search=SEARCH, notes=[title]), read, folder)
        found[name] = folder / "report.html"
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole(browser: Browser, pages: dict[str, Path], case: str, width: int, dark: bool) -> None:
    browser.console.clear()
    browser.asked.clear()
    browser.show(pages[case], width=width, height=900, dark=dark)
    keep_picture(browser, f"{case}-{width}-{'dark' if dark else 'light'}")
    assert browser.console == []
    assert [address for address in browser.asked if not address.startswith(("file:", "data:"))] == []
    assert browser.value("document.documentElement.scrollWidth") == width
    cut = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.box, svg') && e.scrollWidth > innerWidth)"
    assert browser.value(f"{cut}.map(e => e.outerHTML.slice(0, 80))") == []
    shade = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shade.removeprefix("rgb(").rstrip(")").split(","))) < 384) == dark


@pytest.mark.parametrize("width", [1280, 390])
def test_the_table_and_every_plot_are_there_and_not_empty(browser: Browser, pages: dict[str, Path], width: int) -> None:
    browser.show(pages["usual"], width=width, height=900)
    assert browser.value("document.querySelectorAll('table.main thead th').length") == 5
    scrolls = "[...document.querySelectorAll('#table .box')].some(e => e.scrollWidth > e.clientWidth)"
    told = "getComputedStyle(document.querySelector('.sideways')).display !== 'none'"
    assert browser.value(scrolls) == browser.value(told) == (width == 390), "columns out of sight are told"
    assert browser.value("[...document.querySelectorAll('table.main tr.score td')].map(e => e.innerText[0])") == [
        *"998",
        "5",
    ]
    visible = "[...document.querySelectorAll('figure svg')].filter(e => e.getBoundingClientRect().width > 200)"
    titles = browser.value(f"{visible}.map(e => e.getAttribute('aria-label'))")
    assert titles == [
        "Accuracy by peak memory",
        "Accuracy by dollars",
        "Training loss by tokens",
        "Who is right on which rows",
        "Memory by part, planned against measured",
    ]
    assert browser.value(f"Math.min(...{visible}.map(e => e.querySelectorAll('path, rect, circle').length))") > 8
    assert browser.value("document.querySelectorAll('svg.wide path.curve:not(.s0)').length") == 9
    assert browser.value("document.querySelectorAll('#examples .example').length") == 10
    found = "document.querySelector('table.pairs tbody td').getBoundingClientRect().right"
    assert browser.value(f"{found} <= innerWidth"), "what was found of a pair is in sight without scrolling"
    assert browser.value("document.querySelector('table.pairs tbody td').innerText") == "no difference shown"
    assert browser.value("document.querySelectorAll('#recipes details').length") == 10


@pytest.mark.parametrize("case", ["usual", "many", "cpu", "perplexity"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_text_of_a_plot_covers_another_or_leaves_it(
    browser: Browser, pages: dict[str, Path], case: str, width: int
) -> None:
    browser.show(pages[case], width=width, height=900)
    script = """(() => {
        const found = [];
        for (const svg of document.querySelectorAll('figure svg')) {
            const whole = svg.getBoundingClientRect();
            if (!whole.width) continue;
            const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
            texts.forEach(([name, box], place) => {
                if (box.left < whole.left - 4 || box.right > Math.max(whole.right, innerWidth - 8) + 4)
                    found.push('outside: ' + name);
                for (const [other, there] of texts.slice(place + 1)) {
                    const across = Math.min(box.right, there.right) - Math.max(box.left, there.left);
                    const down = Math.min(box.bottom, there.bottom) - Math.max(box.top, there.top);
                    if (across > 1 && down > 4) found.push(name + ' on ' + other);
                }
            });
        }
        return found;
    })()"""
    assert browser.value(script) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_colour_of_text_can_be_read(browser: Browser, pages: dict[str, Path], dark: bool) -> None:
    """Contrast of 4.5 to 1 with what is behind it, the AA level of the web's accessibility guidelines."""
    browser.show(pages["many"], width=1280, height=900, dark=dark)
    names = ["--ink", "--mute", *(f"--s{number}" for number in range(9))]
    script = "getComputedStyle(document.documentElement).getPropertyValue('{}')"
    colours = {name: browser.value(script.format(name)).strip() for name in names}
    for behind in ("--paper", "--taken", "--raised"):
        ground = browser.value(script.format(behind)).strip()
        least = 4.5 if behind == "--paper" else 4.0
        for name, colour in colours.items():
            if behind == "--paper" or name in ("--ink", "--mute"):
                assert contrast(colour, ground) >= least, f"{name} {colour} on {behind} {ground}"


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_prints(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    browser.show(pages["usual"], width=1280, height=900, dark=True)
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="")


def test_a_picture_has_the_size_of_the_page(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    browser.show(pages["one"], width=390, height=900)
    browser.picture(tmp_path / "page.png", top=0, height=500)
    assert struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24]) == (390, 500)


def test_the_browsers_eye_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """A page with an error, a request and an overflow, so that the tests above cannot pass by looking away."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body><div style='width:2000px'>x</div><img src='missing.png'><script>throw new Error('no')</script></body>"
    )
    browser.console.clear()
    browser.asked.clear()
    browser.show(bad, width=390, height=900)
    assert any("exception" in line for line in browser.console)
    assert any("missing.png" in address for address in browser.asked)
    assert browser.value("document.documentElement.scrollWidth") > 390


def keep_picture(browser: Browser, name: str) -> None:
    folder = os.environ.get("THRIFTUNE_PICTURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        height = browser.value("document.documentElement.scrollHeight")
        browser.picture(Path(folder) / f"{name}.png", top=0, height=min(height, 8000))
