"""What doctor finds, on machines that lack one thing or another."""

from __future__ import annotations

import builtins
import shutil
import socket
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from thriftune import doctor
from thriftune.doctor import Finding, examine


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_everything_is_examined_and_nothing_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = by_subject(examine())
    assert {"packages", "processor", "NF4", "disk here", "model cache", "pinned memory", "hub"} <= found.keys()
    assert any(subject.startswith("GPU") for subject in found)
    assert all(finding.text for finding in found.values())
    assert "torch " in found["packages"].text and found["packages"].verdict == "ok"
    assert list(tmp_path.iterdir()) == []


def test_nf4_is_tried_for_real():
    (finding,) = doctor._four_bit()
    assert finding.verdict == "ok" and ("9.1%" in finding.text or "9.2%" in finding.text or "9.3%" in finding.text)


@pytest.mark.parametrize("problem", [RuntimeError("no kernel"), OSError("libcudart is missing"), ImportError("gone")])
def test_a_bitsandbytes_that_does_not_work_is_a_warning(monkeypatch, problem):
    def broken(*arguments, **named):
        raise problem

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    (finding,) = doctor._four_bit()
    assert finding.verdict == "warn" and str(problem) in finding.text


def test_an_nf4_that_answers_wrongly_is_a_warning(monkeypatch):
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda packed, state: torch.zeros(128, 128))
    (finding,) = doctor._four_bit()
    assert finding.verdict == "warn" and "100.0%" in finding.text


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("thriftune.machine.versions", lambda: {"python": "3.11", "peft": "not installed as a package"})
    (finding,) = doctor._python_and_packages()
    assert finding.verdict == "warn" and "missing: peft" in finding.text


def test_a_machine_without_gpu_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = doctor._gpus()
    assert finding.verdict == "note" and "build without CUDA" in finding.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver shows no GPU" in doctor._gpus()[0].text


@pytest.mark.parametrize(("major", "free", "verdicts"), [(9, 80, ["ok"]), (9, 40, ["note"]), (7, 80, ["ok", "warn"])])
def test_gpus_are_listed(monkeypatch, major, free, verdicts):
    properties = namedtuple("Properties", "name major minor")("Test GPU", major, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * 2**30, 80 * 2**30))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    findings = doctor._gpus()
    assert [finding.verdict for finding in findings if finding.subject == "GPU 0"] == verdicts
    assert f"{free}.00 GiB of 80.00 GiB free".replace(".00", "") in findings[0].text.replace(".00", "").replace(
        ".0", ""
    )
    assert findings[-1].subject == "energy" and "pip install" in findings[-1].text


def test_a_full_disk_is_a_warning(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(100, 99, 1))
    assert {finding.verdict for finding in doctor._disk()} == {"warn"}


def test_a_cache_that_does_not_exist_yet_is_looked_up_where_it_will_be(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    assert any(str(tmp_path / "not" / "yet") in finding.text for finding in doctor._disk())
    assert not (tmp_path / "not").exists()


def test_the_hub_is_asked_only_when_it_may_be(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in doctor._hub()[0].text
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        (finding,) = doctor._hub()
    assert time.perf_counter() - started < 3
    assert finding.verdict == "note" and "cannot be reached" in finding.text


def test_windows_has_no_limits_to_tell(monkeypatch):
    original = builtins.__import__

    def without_resource(name, *arguments, **named):
        if name == "resource":
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(builtins, "__import__", without_resource)
    assert doctor._limits() == []
    source = Path(doctor.__file__).read_text(encoding="utf-8")
    exec(compile(source, doctor.__file__, "exec"), {"__name__": "thriftune.doctor"})  # imports without it
