"""A person's own GPUs and prices: read, put before the built-in ones, and refused with all that is wrong at once."""

from __future__ import annotations

import json
import time
from datetime import date, timedelta
from pathlib import Path

import pytest

from thriftune.catalog.gpus import built_in_gpus, find_gpu, gpus
from thriftune.catalog.prices import electricity_price, prices_for
from thriftune.catalog.user import UserRows, config_folder, read_user_rows
from thriftune.errors import InputError
from thriftune.units import GIB

GPU = """
gpus:
  my-card:
    name: My Card
    memory: 24GiB
    bandwidth_gb_per_s: 1000
    tflops_bf16: 100
    tflops_fp16: 100.5
    tflops_fp32: 50
    link_gb_per_s: 25
    power_w: 300
    gpu_class: ampere-consumer
    source: measured here
    date: 2026-11-01
"""
PRICE = """
prices:
  - {gpu: rtx-4090, provider: a friend, kind: on-demand, usd_per_hour: 0.11, source: a talk, date: 2026-11-20}
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    found = tmp_path / "config"
    found.mkdir()
    monkeypatch.setenv("THRIFTUNE_CONFIG_DIR", str(found))
    return found


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read() -> UserRows:
    return read_user_rows(built_in_gpus())


def refusal(*parts: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read()
    for part in parts:
        assert part in caught.value.given, caught.value.given
    return caught.value


def with_field(line: str, text: str = GPU) -> str:
    """The row with one of its fields written otherwise."""
    name = line.split(":")[0]
    return "\n".join(f"    {line}" if old.startswith(f"    {name}:") else old for old in text.splitlines())


def test_where_the_files_are_looked_for(monkeypatch, tmp_path, folder):
    assert config_folder() == folder
    monkeypatch.delenv("THRIFTUNE_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert config_folder() == tmp_path / "xdg" / "thriftune" and read() == UserRows()
    for ignored in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert config_folder() == Path("~/.config/thriftune")


def test_a_folder_that_was_asked_for_and_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("THRIFTUNE_CONFIG_DIR", str(tmp_path / "nowhere"))
    assert "unset THRIFTUNE_CONFIG_DIR" in refusal("nowhere").do


def test_no_files_and_empty_files_are_nothing(folder):
    assert read() == UserRows()
    write(folder, "# nothing yet\n")
    write(folder, "gpus:\nprices:\nelectricity_usd_per_kwh:\n", "b.yml")
    write(folder, "not ours", "notes.txt")
    assert read() == UserRows()


def test_a_card_of_ones_own_is_found_like_any_other(folder):
    write(folder, GPU)
    gpu = find_gpu("MY CARD")
    assert gpu is not None and gpu == gpus()["my-card"]
    assert gpu.memory_bytes == 24 * GIB and gpu.usable_bytes == int(24 * GIB * 0.98)
    assert gpu.bandwidth_bytes_per_s == 1e12 and gpu.flops_bf16 == 100e12 and gpu.flops_fp8 is None
    assert gpu.link_bytes_per_s == 25e9 and gpu.date == date(2026, 11, 1) and not gpu.unified_memory


def test_a_built_in_row_can_be_copied_as_an_example(folder):
    own = Path(__file__).parents[2] / "src/thriftune/catalog/gpus.json"
    rows = json.loads(own.read_text(encoding="utf-8"))["gpus"]
    write(folder, json.dumps({"gpus": {"copy": rows["rtx-4090"], "mac": rows["m3-max-64gb"]}}))
    found = read().gpus
    assert found["copy"].memory_bytes == built_in_gpus()["rtx-4090"].memory_bytes
    assert found["mac"].usable_bytes == 48 * GIB
    assert find_gpu("RTX 4090").key == "copy"  # the user's row goes before the built-in one of that name


def test_a_row_with_a_built_in_key_replaces_it_and_says_so(folder):
    path = write(folder, GPU.replace("my-card", "rtx-4090"))
    assert gpus()["rtx-4090"].name == "My Card" and len(gpus()) == len(built_in_gpus())
    assert read().notes == (f"rtx-4090 is taken from {path}, not from the built-in catalogue",)


def test_prices_and_electricity_of_ones_own(folder):
    path = write(folder, PRICE + "electricity_usd_per_kwh: 0.31\n")
    assert prices_for("rtx-4090")[0].provider == "a friend"
    price = electricity_price()
    assert price.usd_per_kwh == 0.31 and price.source == str(path) and price.date is None
    write(folder, "electricity_usd_per_kwh: 0\n")
    assert electricity_price().usd_per_kwh == 0


def test_a_price_may_name_a_card_of_another_file(folder):
    write(folder, PRICE.replace("rtx-4090", "my-card"), "a.yaml")
    write(folder, GPU, "b.yaml")
    assert [price.gpu for price in read().prices] == ["my-card"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("memory: 24", "memory: expects a size with its unit such as 24GiB or 24564MiB, got 24"),
        ('memory: "24"', "memory: expects a size"),
        ("memory: 24 bananas", "memory: expects a size"),
        ("memory: 0GiB", "memory: expects a size"),
        ("memory: -24GiB", "memory: expects a size"),
        ("memory: true", "memory: expects a size with its unit such as 24GiB or 24564MiB, got True"),
        ("memory: [24GiB]", "memory: expects a size"),
        ("bandwidth_gb_per_s: 0", "bandwidth_gb_per_s: expects a number of GB/s above 0 up to 100,000, got 0"),
        ("bandwidth_gb_per_s: -5", "bandwidth_gb_per_s: expects"),
        ("bandwidth_gb_per_s: .nan", "bandwidth_gb_per_s: expects"),
        ("bandwidth_gb_per_s: .inf", "bandwidth_gb_per_s: expects"),
        ("bandwidth_gb_per_s: true", "bandwidth_gb_per_s: expects"),
        ('bandwidth_gb_per_s: "1000"', "bandwidth_gb_per_s: expects"),
        ("bandwidth_gb_per_s: 1008000000000", "bandwidth_gb_per_s: expects"),  # bytes
        ("bandwidth_gb_per_s: null", "bandwidth_gb_per_s: expects"),
        ("tflops_bf16: 0", "tflops_bf16: expects a number of TFLOP/s above 0"),
        ("tflops_bf16: fast", "tflops_bf16: expects"),
        ("power_w: 300W", "power_w: expects a number of W"),
        ("gpu_class: ampere-consummer", "(did you mean ampere-consumer?)"),
        ("gpu_class: 3", "gpu_class: expects one of turing,"),
        ('source: ""', "source: expects a text"),
        ("source: 5", "source: expects a text"),
        ("date: yesterday", "date: expects a day such as 2026-11-23, got 'yesterday'"),
        ("date: 2026-13-45", "date: expects a day"),
        ("date: 20261101", "date: expects a day"),
        ("date: 2026-11-01 10:00:00", "date: expects a day"),
        ("name: no", "name: expects a text, got False"),
    ],
)
def test_a_field_that_is_wrong_is_named_with_file_and_row(folder, line, message):
    path = write(folder, with_field(line))
    refusal("1 problem:", f"{path}, gpus.my-card: ", message)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("memory_gb: 24", "unknown field 'memory_gb' (did you mean memory?)"),
        ("tflop_fp8: 3", "unknown field 'tflop_fp8' (did you mean tflops_fp8?)"),
        ("usable: 25GiB", "usable: is more than memory"),
        ("compute_capability: nine", "compute_capability: expects a compute capability"),
        ("compute_capability: 9", "compute_capability: expects a compute capability"),
        ("unified_memory: 1", "unified_memory: expects true or false, got 1"),
        ("aliases: mine", "aliases: expects a list of texts"),
        ("aliases: [1]", "aliases: expects a list of texts"),
        ("<<: {power_w: 1}", "unknown field '<<'"),
    ],
)
def test_further_fields_that_are_wrong(folder, extra, message):
    write(folder, GPU + f"    {extra}\n")
    refusal("1 problem:", message)


@pytest.mark.parametrize("field", ["name", "memory", "tflops_bf16", "tflops_fp32", "power_w", "source", "date"])
def test_a_field_that_is_missing(folder, field):
    kept = [line for line in GPU.splitlines() if not line.startswith(f"    {field}:")]
    write(folder, "\n".join(kept))
    refusal("1 problem:", f"gpus.my-card: {field} is missing")


def test_rates_of_types_that_are_not_there_are_null(folder):
    write(folder, with_field("tflops_bf16: null") + "\n    compute_capability: 7.5\n")
    gpu = read().gpus["my-card"]
    assert gpu.flops_bf16 is None and gpu.compute_capability == "7.5"


def test_a_date_in_the_future(folder):
    tomorrow = date.today() + timedelta(days=1)
    write(folder, GPU.replace("2026-11-01", f"{tomorrow}"))
    refusal(f"date: {tomorrow} is in the future")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rtx-4090", "rtx-4009", "there is no GPU with the key 'rtx-4009' (did you mean rtx-4090?)"),
        (", date: 2026-11-20", "", "date is missing"),
        ("source: a talk, ", "", "source is missing"),
        ("0.11", "0", "usd_per_hour: expects a number of US dollars per GPU and hour above 0"),
        ("0.11", "free", "usd_per_hour: expects"),
        ("on-demand", "demand", "kind: expects one of on-demand, spot"),
        ("kind:", "type:", "unknown field 'type'"),
        ("source:", "min_gpus: 0, source:", "min_gpus: expects a whole number from 1 to 1,024, got 0"),
        ("source:", "min_gpus: true, source:", "min_gpus: expects"),
    ],
)
def test_a_price_that_is_wrong(folder, old, new, message):
    path = write(folder, PRICE.replace(old, new))
    refusal(f"{path}, prices row 1: ", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: {}", "unknown key 'gpu' (did you mean gpus?)"),
        ("gpus: [a]", "gpus: expects one `key:` a GPU"),
        ("gpus: {my-card: 24GiB}", "gpus.my-card: expects fields such as name and memory, got '24GiB'"),
        ("gpus: {" + "k" * 90 + ": 1}", f"gpus.{'k' * 60}: expects fields"),
        ("gpus: {My Card: {}}", "a GPU's key is small letters and digits"),
        ("prices: {gpu: t4}", "prices: expects a list"),
        ("prices: [t4]", "prices row 1: expects fields such as gpu"),
        ("electricity_usd_per_kwh: -0.1", "electricity_usd_per_kwh: expects a number of US dollars per kWh from 0"),
        ("electricity_usd_per_kwh: 31 cents", "electricity_usd_per_kwh: expects"),
        ("electricity_usd_per_kwh: true", "electricity_usd_per_kwh: expects"),
        ("just a text", "expects the keys gpus, prices"),
        ("- a\n- b", "expects the keys gpus, prices"),
        ("gpus: {a: {}, a: {}}", "key 'a' is given twice (line 1)"),
        ("gpus: {}\ngpus: {}", "key 'gpus' is given twice (line 2)"),
        ("gpus: {", "cannot be read:"),
        ("gpus: &a {}\nprices: *a", "aliases (*name) are not supported"),
        ("gpus: !!python/object:os.system {}", "tags (tag:yaml.org,2002:python/object:os.system) are not supported"),
        ("gpus: " + "[" * 5000, "nested more than 10 deep (line 1)"),
        ("? [a]\n: b", "a key is not a text"),
        ("gpus: {}\n---\ngpus: {}", "a second document begins (line 2)"),
        ("electricity_usd_per_kwh: " + "9" * 5000, "cannot be read:"),
        ("# " + "x" * 600_000, "longer than 500,000 characters"),
    ],
)
def test_a_file_that_is_wrong(folder, text, message):
    path = write(folder, text)
    begin = time.perf_counter()
    error = refusal(str(path), message)
    assert len(str(error)) < 2000 and time.perf_counter() - begin < 5


def test_bytes_that_are_no_text_and_a_folder_with_a_files_name(folder):
    (folder / "a.yaml").write_bytes(b"gpus: \xff\xfe")
    (folder / "b.yaml").mkdir()
    refusal("2 problems:", "a.yaml: is not UTF-8 text", "b.yaml: cannot be read:")


def test_what_two_files_both_say_is_refused(folder):
    text = GPU + PRICE + "electricity_usd_per_kwh: 0.3\n"
    write(folder, text, "a.yaml")
    write(folder, text, "b.yaml")
    error = refusal(
        "3 problems:", "b.yaml, gpus.my-card: is in ", "b.yaml, prices row 1: the same GPU, provider and kind"
    )
    assert "electricity_usd_per_kwh is in " in error.given


def test_all_problems_of_all_files_come_at_once(folder):
    write(folder, with_field("memory: 24") + "\n    colour: green\n", "a.yaml")
    write(folder, PRICE.replace("0.11", "-1") + "electricity: 1\n", "b.yaml")
    error = refusal("4 problems:", "a.yaml, gpus.my-card: memory", "'colour'", "b.yaml, prices row 1", "'electricity'")
    assert str(folder) in error.do
    with pytest.raises(InputError):
        find_gpu("t4")  # everything that reads the user's files says so
