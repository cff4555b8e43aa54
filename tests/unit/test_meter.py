"""The meter of a run: energy is read a few times a second only, and once more at the end."""

from __future__ import annotations

import pytest
import torch

from thriftune.train import meter as meter_module
from thriftune.train.meter import Meter


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A counter that goes up by 10 J at every reading, on a clock that stands still until a test moves it."""
    found: list[float] = []

    def read() -> float:
        found.append(1000.0 + 10.0 * len(found))
        return found[-1]

    monkeypatch.setattr(meter_module, "_energy_counter", lambda device: read)
    return found


def test_energy_is_read_again_only_after_a_while(readings: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: clock[0])
    meter = Meter(torch.device("cpu"))
    assert [meter.energy_j(), meter.energy_j()] == [0.0, 0.0] and len(readings) == 1
    clock[0] += meter_module.ENERGY_EVERY_S
    assert [meter.energy_j(), meter.energy_j()] == [10.0, 10.0] and len(readings) == 2
    assert meter.energy_j(now=True) == 20.0


def test_energy_is_left_out_where_it_is_not_asked_for(readings: list[float]) -> None:
    assert Meter(torch.device("cpu"), energy=False).energy_j(now=True) is None
    assert not readings


def test_a_cpu_has_no_counter() -> None:
    assert Meter(torch.device("cpu")).energy_j(now=True) is None
