"""Meters: how much energy the devices of this host have used.

A meter's reading only grows; differences between readings are what counts. NVML's counter is
the device's own (`nvmlDeviceGetTotalEnergyConsumption`, Volta and newer), RAPL's the
processor's; where neither can be read, power times time is an estimate, and says so.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainonce.clock import Clock, SystemClock
from trainonce.events import EnergyUsed

if TYPE_CHECKING:
    from collections.abc import Sequence

_RAPL = Path("/sys/class/powercap")


# Rated power of a server processor over its threads, where nothing measures.
THREAD_W = 6.0
GPU_W = 400.0


@functools.cache
def _gpu_limit_w() -> float:
    """Return the power limit of the first device, or `GPU_W` where NVML does not tell."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml.nvmlDeviceGetEnforcedPowerLimit(nvml.nvmlDeviceGetHandleByIndex(0)) / 1000.0
    except Exception:  # NVML's errors share no useful base
        return GPU_W


def rated_power_w(*, threads: int = 0, gpus: int = 0) -> float:
    """Return the power that devices are rated for: an estimate for what was not measured.

    Args:
        threads: CPU threads, at `THREAD_W` each.
        gpus: Devices, at the limit that NVML enforces, or `GPU_W` each.
    """
    return threads * THREAD_W + (gpus * _gpu_limit_w() if gpus else 0.0)


class Meter(Protocol):
    """Reads how much energy has been used.

    Attributes:
        source: "nvml", "rapl" or "tdp".
        is_estimate: It does not measure.
    """

    source: str
    is_estimate: bool

    def read_j(self) -> float:
        """Return joules used since some fixed instant."""
        ...


class NvmlMeter:
    """The energy counters of NVIDIA devices.

    Args:
        indices: Devices in NVML's order; None for all.
        nvml: The `pynvml` module, for tests.

    Raises:
        OSError: There is no pynvml, no driver, no device, or no counter on the device.
    """

    source = "nvml"
    is_estimate = False

    def __init__(self, indices: Sequence[int] | None = None, nvml: Any = None) -> None:
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            chosen = range(self._nvml.nvmlDeviceGetCount()) if indices is None else indices
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in chosen]
            if not self._handles:
                raise OSError("NVML sees no device")
            self.read_j()
        except ImportError as error:
            raise OSError("nvidia-ml-py is not installed") from error
        except OSError:
            raise
        except Exception as error:  # NVML's errors share no useful base
            raise OSError(f"NVML cannot be read: {error}") from error

    def read_j(self) -> float:
        """Return joules, summed over the devices."""
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return sum(read(handle) for handle in self._handles) / 1000.0


class RaplMeter:
    """The energy counters of Intel and AMD processors, through powercap.

    Args:
        root: Folder of the powercap zones.

    Raises:
        OSError: There is no zone, or it may not be read (it often wants root).
    """

    source = "rapl"
    is_estimate = False

    def __init__(self, root: Path = _RAPL) -> None:
        # Packages only ("intel-rapl:0"); their parts ("intel-rapl:0:1") are in the sum.
        self._zones = [zone for zone in sorted(root.glob("*-rapl:*")) if zone.name.count(":") == 1]
        if not self._zones:
            raise OSError(f"no RAPL zone in {root}")
        self._range_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last_uj = [self._read_uj(zone) for zone in self._zones]
        self._total_uj = 0

    def read_j(self) -> float:
        """Return joules since the meter was made; must be called before a counter wraps twice."""
        for index, zone in enumerate(self._zones):
            now_uj = self._read_uj(zone)
            used_uj = now_uj - self._last_uj[index]
            if used_uj < 0:
                used_uj += self._range_uj[index]
            self._last_uj[index] = now_uj
            self._total_uj += used_uj
        return self._total_uj / 1e6

    @staticmethod
    def _read_uj(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())


class TdpMeter:
    """Power times time: an estimate, and for a device that is not always busy too high.

    Args:
        watts: Power of all devices together.
        clock: For tests.
    """

    source = "tdp"
    is_estimate = True

    def __init__(self, watts: float, clock: Clock | None = None) -> None:
        self._watts = watts
        self._clock = clock or SystemClock()
        self._begin_s = self._clock.mono_s()

    def read_j(self) -> float:
        """Return joules since the meter was made."""
        return self._watts * (self._clock.mono_s() - self._begin_s)


class EnergyLog:
    """Turns a meter's readings into events, each with what was used since the last.

    Args:
        meter: What to read.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._last_j = meter.read_j()

    def sample(self) -> EnergyUsed | None:
        """Return the event to append now; None where the meter cannot be read just now.

        The next reading then holds what this one lacks.
        """
        try:
            now_j = self._meter.read_j()
        except Exception:
            return None  # a driver that went away must not end a job
        # A counter that was reset (a driver reload) begins again from nothing.
        used_j = now_j - self._last_j if now_j >= self._last_j else now_j
        self._last_j = now_j
        return EnergyUsed(
            energy_j=used_j, source=self._meter.source, is_estimate=self._meter.is_estimate
        )


def open_meter(
    gpu_indices: Sequence[int] | None = None, estimate_w: float | None = None
) -> Meter | None:
    """Return the best meter there is on this host, or None.

    Args:
        gpu_indices: Devices of the job, in NVML's order; None for all.
        estimate_w: Power of all devices together, for an estimate where nothing measures.
    """
    for make in (lambda: NvmlMeter(gpu_indices), RaplMeter):
        try:
            return make()
        except (OSError, ValueError):
            continue
    return None if estimate_w is None else TdpMeter(estimate_w)
