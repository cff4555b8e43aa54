"""The GPUs of the catalogue: plausible rows, found by their usual names, and this machine's own by its driver."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from thriftune.catalog.fields import GPU_CLASSES
from thriftune.catalog.gpus import LIST_COMMAND, built_in_gpus, find_gpu, gpus, local_gpus
from thriftune.catalog.rows import Gpu
from thriftune.errors import InputError
from thriftune.units import GIB, MIB

ROWS = built_in_gpus()


@pytest.fixture(autouse=True)
def nothing_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("THRIFTUNE_CONFIG_DIR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))


@pytest.mark.parametrize("gpu", ROWS.values(), ids=lambda gpu: gpu.key)
def test_every_row_is_plausible(gpu: Gpu):
    assert 8 * GIB <= gpu.memory_bytes <= 512 * GIB
    assert 0.6 * gpu.memory_bytes < gpu.usable_bytes < gpu.memory_bytes
    assert 60e9 <= gpu.bandwidth_bytes_per_s <= 10e12
    assert 2e12 <= gpu.flops_fp32 <= 200e12
    assert gpu.flops_fp16 is not None and gpu.flops_fp32 <= gpu.flops_fp16 <= 2500e12
    assert gpu.flops_bf16 in (None, gpu.flops_fp16)
    if gpu.flops_fp8 is not None:
        assert gpu.flops_fp8 == pytest.approx(2 * gpu.flops_fp16, rel=0.02)
    assert 30 <= gpu.power_w <= 1000
    assert gpu.gpu_class in GPU_CLASSES
    assert "https://" in gpu.source and "usable:" in gpu.source
    assert date(2020, 1, 1) < gpu.date <= date.today()


@pytest.mark.parametrize("gpu", ROWS.values(), ids=lambda gpu: gpu.key)
def test_what_belongs_together_agrees(gpu: Gpu):
    capability = {"turing": "7.5", "volta": "7.0", "hopper": "9.0", "blackwell-consumer": "12.0", "blackwell": "10.0"}
    if gpu.gpu_class in capability:
        assert gpu.compute_capability == capability[gpu.gpu_class]
    assert (gpu.compute_capability is None) == (gpu.gpu_class in ("apple", "cdna3"))
    assert gpu.unified_memory == (gpu.gpu_class == "apple")
    assert gpu.flops_bf16 is not None or gpu.gpu_class in ("turing", "volta") or gpu.key.startswith("m1")
    assert (gpu.flops_fp8 is not None) == gpu.gpu_class.startswith(("ada", "hopper", "blackwell", "cdna3"))
    if gpu.unified_memory:
        assert gpu.link_bytes_per_s == gpu.bandwidth_bytes_per_s
        assert f"{gpu.memory_bytes // GIB}gb" in gpu.key
    else:
        assert gpu.link_bytes_per_s in (12e9, 12.5e9, 25e9, 55e9)


def test_known_facts_of_known_cards():
    assert ROWS["rtx-4090"].memory_bytes == 24564 * MIB and ROWS["rtx-4090"].flops_bf16 == pytest.approx(165.2e12)
    assert ROWS["rtx-3090"].flops_bf16 == pytest.approx(71e12) and ROWS["t4"].flops_bf16 is None
    assert ROWS["h200"].memory_bytes == 143771 * MIB and ROWS["h200"].bandwidth_bytes_per_s == 4.8e12
    assert ROWS["m3-max-64gb"].usable_bytes == 48 * GIB


@pytest.mark.parametrize(
    "name",
    [
        *(
            "T4",
            "V100 16GB",
            "V100 32GB",
            "L4",
            "A10G",
            "A5000",
            "RTX 3060",
            "RTX 3090",
            "RTX 4060 Ti 16GB",
            "RTX 4070",
        ),
        *("RTX 4080", "RTX 4090", "RTX 5080", "RTX 5090", "A6000", "6000 Ada", "L40S", "A100 40GB", "A100 80GB"),
        *("H100 SXM", "H100 PCIe", "H200", "B200", "MI300X", "M1 16GB", "M2 Max 64GB", "M3 Ultra 512GB", "M4 Pro 48GB"),
    ],
)
def test_what_people_train_on_is_there(name):
    gpu = find_gpu(name)
    assert gpu.usable_bytes < gpu.memory_bytes and gpu.bandwidth_bytes_per_s and gpu.link_bytes_per_s and gpu.power_w
    assert gpu.unified_memory == name.startswith("M") - name.startswith("MI")


def test_keys_are_written_once_and_no_name_means_two_gpus():
    text = (Path(__file__).parents[2] / "src/thriftune/catalog/gpus.json").read_text(encoding="utf-8")
    pairs: list[str] = []
    json.loads(text, object_pairs_hook=lambda found: pairs.extend(key for key, _ in found) or dict(found))
    assert Counter(pairs)["rtx-4090"] == 1 and all(Counter(pairs)[key] == 1 for key in ROWS)
    for gpu in ROWS.values():
        for name in (gpu.key, gpu.name, *gpu.aliases):
            assert find_gpu(name, {}) is gpu, name


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        (" 4090 ", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("a100-80gb", "a100-80gb"),
        ("A100 80GB", "a100-80gb"),
        ("A100 80 GiB", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("h200", "h200"),
        ("NVIDIA H200", "h200"),
        ("a6000", "a6000"),
        ("6000 ada", "6000-ada"),
        ("NVIDIA RTX 6000 Ada Generation", "6000-ada"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("Apple M3 Max 64 GB", "m3-max-64gb"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_gpu_is_found_by_its_usual_names(text, key):
    assert find_gpu(text).key == key


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("a100", "any of 4: a100-40gb, a100-40gb-pcie, a100-80gb, a100-80gb-pcie"),
        ("NVIDIA H100", "any of 3: h100-sxm, h100-pcie, h100-nvl"),
        ("v100", "any of 3: v100-16gb, v100-32gb, v100-32gb-pcie"),
        ("m4 pro", "any of 3: m4-pro-24gb, m4-pro-48gb, m4-pro-64gb"),
    ],
)
def test_a_name_that_fits_several_is_refused_with_all_of_them(text, keys):
    with pytest.raises(InputError) as caught:
        find_gpu(text)
    assert keys in caught.value.given and LIST_COMMAND in caught.value.do


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("rtx 4070 ti", "rtx-4070"),
        ("4060", "rtx-4060-ti-16gb"),
        ("RTX 4090 Laptop GPU", "rtx-4090"),
        ("rtx-4091", "409"),
    ],
)
def test_another_card_of_a_similar_name_is_not_taken_for_it(text, nearest):
    with pytest.raises(InputError) as caught:
        find_gpu(text)
    assert f"called {text!r}" in caught.value.given and nearest in caught.value.given.split("near to it:")[1]


@pytest.mark.parametrize("text", ["", "   ", "-", "NVIDIA", "zzzz", "\x00", "x" * 10_000, "(a|b)*["])
def test_nonsense_is_refused_with_a_way_out(text):
    with pytest.raises(InputError) as caught:
        find_gpu(text)
    assert "gpus.yaml" in caught.value.do and LIST_COMMAND in caught.value.allowed
    assert len(str(caught.value)) < 1000


def test_the_whole_catalogue_loads_quickly():
    code = (
        "import time; begin = time.perf_counter()\n"
        "from thriftune.catalog.gpus import gpus\nfrom thriftune.catalog.prices import prices\n"
        "imported = time.perf_counter(); gpus(); prices(); print(time.perf_counter() - imported)\n"
        "import sys; assert not {'torch', 'yaml', 'pydantic', 'pynvml'} & set(sys.modules)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.050


# The driver of this machine: a program called nvidia-smi at the front of PATH.

LINES = {
    "4090": "0, GPU-aaaa1111-0000, NVIDIA GeForce RTX 4090, 24564, 23000, 350.00, 8.9",
    "h200": "1, GPU-bbbb2222-0000, NVIDIA H200, 143771, 143000, 700.00, 9.0",
    "new": "2, GPU-bbbb3333-0000, NVIDIA GeForce RTX 9999, 65536, 65000, 800.00, 15.0",
}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Makes nvidia-smi a script that prints the given lines, or runs the given commands."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    folder = tmp_path / "driver"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(*lines: str, commands: str | None = None) -> None:
        listed = "\n".join(lines)
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{commands or f'cat <<END{chr(10)}{listed}{chr(10)}END'}\n")
        program.chmod(0o755)

    return install


def test_no_driver_no_gpus(driver):
    assert local_gpus() == []


def test_a_local_gpu_is_its_row_with_what_the_driver_says(driver):
    driver(LINES["4090"], LINES["h200"])
    first, second = local_gpus()
    assert first.gpu is not None and first.gpu.key == "rtx-4090" and first.note is None
    assert first.gpu.memory_bytes == 24564 * MIB and first.gpu.usable_bytes == first.free_bytes == 23000 * MIB
    assert first.gpu.power_w == first.power_limit_w == 350 and first.compute_capability == "8.9"
    assert first.gpu.flops_bf16 == ROWS["rtx-4090"].flops_bf16
    assert second.gpu is not None and second.gpu.key == "h200" and second.index == 1
    assert ROWS["rtx-4090"].power_w == 450


def test_a_card_that_is_not_in_the_catalogue_gives_a_note(driver):
    driver(LINES["new"])
    (local,) = local_gpus()
    assert local.gpu is None and local.total_bytes == 64 * GIB
    assert local.note is not None and "RTX 9999 with 64.00 GiB, is not in the catalogue" in local.note


@pytest.mark.parametrize(
    ("name", "mebibytes", "key"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, None),
        ("NVIDIA GeForce RTX 3080", 12288, None),
        ("NVIDIA RTX 6000 Ada Generation", 46068, "6000-ada"),  # with error correction
        ("NVIDIA A100-SXM4-80GB", 9728, None),  # a slice of it
    ],
)
def test_the_memory_tells_cards_of_one_name_apart(driver, name, mebibytes, key):
    driver(f"0, GPU-1, {name}, {mebibytes}, {mebibytes}, 200.00, 8.9")
    (local,) = local_gpus()
    assert (local.gpu.key if local.gpu else None) == key


def test_a_driver_that_does_not_know_everything(driver):
    driver("warning: infoROM is corrupted", "0, GPU-1, NVIDIA H200, [N/A], [N/A], [Not Supported], [N/A]")
    (local,) = local_gpus()
    assert local.total_bytes is None and local.power_limit_w is None and local.compute_capability is None
    assert local.gpu == ROWS["h200"]


def test_an_old_driver_that_refuses_compute_cap(driver):
    driver(
        commands='case "$1" in *compute_cap*) echo "Field compute_cap is not valid"; exit 2;; esac\n'
        "echo '0, GPU-1, Tesla T4, 15360, 15000, 70.00'"
    )
    (local,) = local_gpus()
    assert local.gpu is not None and local.gpu.key == "t4" and local.compute_capability is None


@pytest.mark.parametrize(
    "commands", ["exit 9", "echo No devices were found; exit 6", "printf '\\377\\376,,'", "kill -9 $$"]
)
def test_a_broken_driver_is_no_gpus(driver, commands):
    driver(commands=commands)
    assert local_gpus() == []


def test_a_driver_that_hangs_is_left_after_a_while(driver, monkeypatch):
    monkeypatch.setattr("thriftune.catalog.gpus.DRIVER_ANSWERS_WITHIN_S", 0.3)
    driver(commands="exec sleep 30")
    begin = time.perf_counter()
    assert local_gpus() == []
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    ("chosen", "indices"),
    [
        ("0,1,2", [0, 1, 2]),
        ("1", [1]),
        (" 2 , 0 ", [2, 0]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,7", [0]),
        ("1,1", []),
        ("GPU-aaaa1111-0000", [0]),
        ("GPU-bbbb3", [2]),
        ("GPU-bbbb", []),  # begins two of them
        ("GPU-cccc", []),
        ("MIG-aaaa1111", []),
        ("NoDevFiles", []),
    ],
)
def test_the_visible_devices_are_respected(driver, monkeypatch, chosen, indices):
    driver(*LINES.values())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [local.index for local in local_gpus()] == indices


NVML = """
from types import SimpleNamespace
class NVMLError(Exception): pass
def nvmlInit(): {init}
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return b"NVIDIA L4"
def nvmlDeviceGetUUID(handle): return "GPU-nvml"
def nvmlDeviceGetMemoryInfo(handle): return SimpleNamespace(total=23034 * 2**20, free=20000 * 2**20)
def nvmlDeviceGetPowerManagementLimit(handle): raise NVMLError("not supported")
def nvmlDeviceGetCudaComputeCapability(handle): return (8, 9)
"""


@pytest.mark.parametrize(("init", "key"), [("pass", "l4"), ("raise NVMLError('no driver')", "rtx-4090")])
def test_nvml_is_asked_first_and_the_program_when_it_fails(driver, monkeypatch, tmp_path, init, key):
    driver(LINES["4090"])
    monkeypatch.delitem(sys.modules, "pynvml")
    (tmp_path / "pynvml.py").write_text(NVML.format(init=init))
    monkeypatch.syspath_prepend(tmp_path)
    (local,) = local_gpus()
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    assert local.gpu is not None and local.gpu.key == key
    if key == "l4":
        assert local.gpu.usable_bytes == 20000 * MIB and local.gpu.power_w == 72 and local.uuid == "GPU-nvml"


def test_gpus_is_a_copy():
    gpus().clear()
    assert gpus().keys() == ROWS.keys()
