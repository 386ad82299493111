"""Meters and their events."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from trainonce.clock import FakeClock
from trainonce.ledger.carbon import G_PER_KWH, carbon_g_per_kwh
from trainonce.ledger.economics import Energy
from trainonce.ledger.energy import EnergyLog, NvmlMeter, RaplMeter, TdpMeter, open_meter
from trainonce.ledger.prices import EconomicsSettings, Prices
from trainonce.ledger.report import build
from trainonce.ledger.text import energy_words

from .ledger_jobs import begin, end, write


def fake_nvml(counters_mj: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(counters_mj),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda index: counters_mj[index],
    )


def zone(root: Path, name: str, energy_uj: int) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_nvml_counters_are_summed_over_the_jobs_devices() -> None:
    counters = [1000, 2000, 4000]
    meter = NvmlMeter([0, 2], fake_nvml(counters))
    assert meter.read_j() == 5.0
    assert NvmlMeter(None, fake_nvml(counters)).read_j() == 7.0
    assert (meter.source, meter.is_estimate) == ("nvml", False)


def test_nvml_that_cannot_be_read_says_why() -> None:
    def broken() -> None:
        raise RuntimeError("Driver Not Loaded")

    with pytest.raises(OSError, match="Driver Not Loaded"):
        NvmlMeter(None, SimpleNamespace(nvmlInit=broken))
    with pytest.raises(OSError, match="no device"):
        NvmlMeter(None, fake_nvml([]))


def test_rapl_packages_are_summed_and_a_counter_may_wrap(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 900_000), zone(tmp_path, "intel-rapl:1", 0)
    zone(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0
    meter = RaplMeter(tmp_path)
    assert meter.read_j() == 0.0
    (first / "energy_uj").write_text("100000")
    (second / "energy_uj").write_text("50000")
    assert meter.read_j() == pytest.approx(0.2 + 0.05)
    with pytest.raises(OSError, match="no RAPL zone"):
        RaplMeter(tmp_path / "none")


def test_an_estimate_is_power_times_time_and_says_so() -> None:
    clock = FakeClock()
    meter = TdpMeter(700.0, clock)
    clock.advance(10.0)
    assert meter.read_j() == 7000.0
    event = EnergyLog(meter).sample()
    assert event is not None
    assert (event.energy_j, event.is_estimate, event.source) == (0.0, True, "tdp")


def test_events_hold_what_was_used_since_the_last_also_after_trouble() -> None:
    counters = [1000]
    log = EnergyLog(NvmlMeter(None, fake_nvml(counters)))
    counters[0] = 3500
    assert log.sample().energy_j == 2.5
    good = counters.pop()
    assert log.sample() is None  # the driver went away
    counters.append(good + 500)
    assert log.sample().energy_j == 0.5
    counters[0] = 200  # reset by a driver reload
    assert log.sample().energy_j == 0.2


def test_the_best_meter_is_chosen_and_without_any_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise OSError("nothing")

    monkeypatch.setattr("trainonce.ledger.energy.NvmlMeter", nothing)
    monkeypatch.setattr("trainonce.ledger.energy.RaplMeter", nothing)
    assert open_meter() is None
    assert isinstance(open_meter(estimate_w=100.0), TdpMeter)
    zone(tmp_path, "intel-rapl:0", 1)
    monkeypatch.setattr("trainonce.ledger.energy.RaplMeter", lambda: RaplMeter(tmp_path))
    assert isinstance(open_meter(estimate_w=100.0), RaplMeter)


def test_energy_nobody_measured_is_estimated_from_tdp_and_labelled(tmp_path: Path) -> None:
    ledger = write(tmp_path, j=[*begin("j"), end(3600, 10)])
    settings = EconomicsSettings(prices=Prices(gpu_tdp_w=700.0, pue=1.5, carbon_g_per_kwh=100.0))
    energy = build(ledger, settings, 2e9).jobs[0].economics.energy
    assert energy.it_kwh == pytest.approx(5 * 0.7)  # four ranks and a spare for an hour
    assert energy.facility_kwh == pytest.approx(5 * 0.7 * 1.5)
    assert energy.co2_kg == pytest.approx(5 * 0.7 * 1.5 * 0.1)
    assert "estimate: tdp" in energy_words(energy)
    unknown = build(ledger, EconomicsSettings(), 2e9).jobs[0].economics.energy
    assert unknown.it_kwh is None
    assert "not measured" in energy_words(unknown)


def test_carbon_intensities_are_those_of_the_published_table() -> None:
    published = {"USA": 369, "FRA": 56, "DEU": 381, "IND": 713, "SWE": 41}
    assert {name: round(G_PER_KWH[name]) for name in published} == published
    assert carbon_g_per_kwh("fra") == G_PER_KWH["FRA"]
    assert len(G_PER_KWH) == 212
    assert all(20 <= value < 1500 for value in G_PER_KWH.values())


def test_large_amounts_have_no_exponent() -> None:
    large = energy_words(
        Energy(it_kwh=1014.65, facility_kwh=98_765.4, co2_kg=1234.5, source="nvml")
    )
    assert "1,015 kWh, 98,765 kWh with" in large
    assert "1,234 kg CO2e" in large
