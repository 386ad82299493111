"""What the last readings of one device say together."""

from __future__ import annotations

import math
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trainonce.fleet.signals import Reading


def since(history: Sequence[Reading], begin_s: float) -> list[Reading]:
    """Return the readings from `begin_s` on, oldest first."""
    return list(takewhile(lambda reading: reading.mono_s >= begin_s, reversed(history)))[::-1]


def latest(recent: Sequence[Reading], name: str) -> Any:
    """Return the last value that is known: several sources may read one device in turn."""
    values = (getattr(reading, name) for reading in reversed(recent))
    return next((value for value in values if value is not None), None)


def gained(recent: Sequence[Reading], name: str) -> tuple[float, float]:
    """Return by how much a total grew, and over how many seconds; what it held before is history.

    A total that falls was reset (a new driver, a reboot): what it shows then has been gained since.
    """
    told = [(r.mono_s, getattr(r, name)) for r in recent]
    known = [(when_s, total) for when_s, total in told if total is not None]
    gained = 0.0
    for (_, before), (_, after) in zip(known, known[1:], strict=False):
        gained += after - before if after >= before else after
    return gained, known[-1][0] - known[0][0] if known else 0.0


def powers(
    recent: Sequence[Reading],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return temperatures, and the mean power up to each, in watts: [readings] each.

    Readings that show no more energy than the one before are left out: an exporter that was not
    refreshed shows the same again.
    """
    told = [(r.mono_s, r.temperature_c, r.energy_j) for r in recent]
    rows: list[tuple[float, float]] = []
    last: tuple[float, float] | None = None
    for when_s, degrees, energy_j in told:
        if degrees is None or energy_j is None or not math.isfinite(degrees):
            continue
        if last is None or energy_j < last[1]:  # a counter that was reset
            rows, last = [], (when_s, energy_j)
        elif energy_j > last[1] and when_s > last[0]:
            rows.append((degrees, (energy_j - last[1]) / (when_s - last[0])))
            last = when_s, energy_j
    degrees, watts = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return degrees, watts


def temperatures(recent: Sequence[Reading]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return when temperatures were read, and which: [readings] each."""
    told = [(r.mono_s, r.temperature_c) for r in recent if r.temperature_c is not None]
    known = [(when_s, degrees) for when_s, degrees in told if math.isfinite(degrees)]
    times, degrees = np.array(known, dtype=np.float64).reshape(-1, 2).T
    return times, degrees
