"""What a run has spent so far, and what its budget says to that: one warning, then a stop.

One meter for money and energy, for whoever starts a run: `trainonce run` and `trainonce.fit`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.clock import Clock, SystemClock
from trainonce.errors import BudgetSpentError, ConfigError
from trainonce.ledger.energy import open_meter

if TYPE_CHECKING:
    from trainonce.ledger.energy import Meter
    from trainonce.ledger.prices import Prices

WARN_AT = 0.8
_J_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may use; None: as much as it takes.

    Args:
        max_cost_usd: Money, by the price of a device hour in settings.toml.
        max_kwh: Energy of the devices times the data centre's PUE.
        max_hours: Hours by the clock.

    Raises:
        ConfigError: A limit is no positive number.
    """

    max_cost_usd: float | None = None
    max_kwh: float | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not (isinstance(limit, int | float) and math.isfinite(limit) and limit > 0):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"{name} is {limit!r}", hint="a number above 0, or leave it out")

    def limits(self) -> dict[str, float]:
        """Return the limits that are set, by name."""
        found = {
            "max_cost_usd": self.max_cost_usd,
            "max_kwh": self.max_kwh,
            "max_hours": self.max_hours,
        }
        return {name: limit for name, limit in found.items() if limit is not None}


class Action(enum.Enum):
    """What to do about a budget."""

    GO_ON = "go on"
    WARN = "warn"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class BudgetDecision:
    """What to do now, and why.

    Args:
        action: Of the limit that is closest.
        reason: One sentence, with the figures.
    """

    action: Action
    reason: str


_UNITS = {"max_cost_usd": "USD", "max_kwh": "kWh", "max_hours": "hours"}


class SpendingMeter:
    """Measures what a run uses, from when it is made.

    Args:
        devices: Held for the run, spares included.
        prices: Of the settings.
        energy: Reads joules; None where nothing does.
        clock: For tests.
    """

    def __init__(
        self,
        devices: int,
        prices: Prices,
        energy: Meter | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._devices = devices
        self._prices = prices
        self._energy = energy
        self._spent: dict[str, float] = {}
        self._clock = clock or SystemClock()
        self._begun_s = self._clock.mono_s()
        self._begun_j = energy.read_j() if energy else 0.0

    def restart(self, spent: dict[str, float]) -> None:
        """Begin anew, with what an earlier part of the same run used."""
        self._spent = dict(spent)
        self._begun_s = self._clock.mono_s()
        self._begun_j = self._energy.read_j() if self._energy else 0.0

    def used(self) -> dict[str, float]:
        """Return `max_hours`, `max_cost_usd` and `max_kwh` so far; what is not known is absent."""
        hours = (self._clock.mono_s() - self._begun_s) / 3600.0
        found = {"max_hours": hours}
        if self._prices.usd_per_gpu_hour is not None:
            found["max_cost_usd"] = hours * self._devices * self._prices.usd_per_gpu_hour
        if self._energy is not None:
            joules = self._energy.read_j() - self._begun_j
            found["max_kwh"] = joules / _J_PER_KWH * self._prices.pue
        return {name: amount + self._spent.get(name, 0.0) for name, amount in found.items()}


class BudgetGate:
    """Decides what a budget says: one warning at 80 %, a stop at 100 %. Reads no clock itself.

    Args:
        budget: The limits.
        used: What is spent before anything ran, by the names of `SpendingMeter.used`.

    Raises:
        ConfigError: A limit is set on what nobody can measure here.
        BudgetSpentError: A limit is reached already.
    """

    def __init__(self, budget: Budget, used: dict[str, float]) -> None:
        self._limits = budget.limits()
        self._warned = False
        for name, limit in self._limits.items():
            if name not in used:
                raise ConfigError(f"{name}={limit:g} cannot be kept: {_WHY[name]}", hint=_HOW[name])
        self.check(used)

    @property
    def has_limits(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._limits)

    def check(self, used: dict[str, float]) -> None:
        """Raise BudgetSpentError if a limit is reached."""
        if self.is_spent(used):
            raise BudgetSpentError(
                f"the budget is spent: {self.reason(used)}",
                hint="raise the limit to go on",
            )

    def is_spent(self, used: dict[str, float]) -> bool:
        """Tell whether a limit is reached."""
        return any(used.get(name, 0.0) >= limit for name, limit in self._limits.items())

    def reason(self, used: dict[str, float]) -> str:
        """Return how far the limit is used that is closest."""
        name = max(self._limits, key=lambda each: used.get(each, 0.0) / self._limits[each])
        amount, limit = used.get(name, 0.0), self._limits[name]
        return f"{amount:.4g} of {limit:g} {_UNITS[name]} ({amount / limit:.0%})"

    def decide(self, used: dict[str, float]) -> BudgetDecision:
        """Return what to do now. A warning is given once."""
        if not self._limits:
            return BudgetDecision(action=Action.GO_ON, reason="no budget")
        reason = self.reason(used)
        if self.is_spent(used):
            return BudgetDecision(action=Action.STOP, reason=reason)
        share = max(used.get(name, 0.0) / limit for name, limit in self._limits.items())
        if share >= WARN_AT and not self._warned:
            self._warned = True
            return BudgetDecision(action=Action.WARN, reason=reason)
        return BudgetDecision(action=Action.GO_ON, reason=reason)


def open_spending(
    budget: Budget, devices: int, economics: Prices
) -> tuple[SpendingMeter, BudgetGate]:
    """Return a meter that runs from now, and the gate of a budget.

    Raises:
        ConfigError: A limit is set on what nobody can measure here.
    """
    estimate_w = economics.gpu_tdp_w
    wants_energy = budget.max_kwh is not None
    energy = open_meter(None, estimate_w and estimate_w * devices) if wants_energy else None
    meter = SpendingMeter(devices, economics, energy)
    return meter, BudgetGate(budget, meter.used())


_WHY = {
    "max_cost_usd": "there is no price of a device hour",
    "max_kwh": "nothing on this host measures energy",
}
_HOW = {
    "max_cost_usd": "set usd_per_gpu_hour under [economics] in settings.toml",
    "max_kwh": "set gpu_tdp_w under [economics] in settings.toml, for an estimate",
}
