"""What the economics are computed with: prices, power, the contract; from `settings.toml`.

::

    [economics]
    usd_per_gpu_hour = 2.5
    country = "FRA"            # or carbon_g_per_kwh = 40
    pue = 1.2
    gpu_tdp_w = 700            # for estimates where energy was not measured

    [economics.projects.nlp]   # any of the above, for one project tag
    usd_per_gpu_hour = 1.9

    [contract]
    start = 2026-01-01
    fee_usd = 50000
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.ledger.carbon import carbon_g_per_kwh

if TYPE_CHECKING:
    from pathlib import Path


_THRESHOLDS = (0.5, 0.8, 1.0)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a job's resources cost.

    Args:
        usd_per_gpu_hour: Price of one rank's device for an hour; None: no money is shown.
        country: ISO 3166-1 alpha-3 code; None: no CO2 is shown, unless `carbon_g_per_kwh`.
        carbon_g_per_kwh: Carbon intensity; None: that of `country`.
        pue: Power usage effectiveness of the data centre: facility energy over IT energy.
        gpu_tdp_w: Power of one device, for estimates; None: none is made.
    """

    usd_per_gpu_hour: float | None = None
    country: str | None = None
    carbon_g_per_kwh: float | None = None
    pue: float = 1.0
    gpu_tdp_w: float | None = None

    def __post_init__(self) -> None:
        for name in ("usd_per_gpu_hour", "carbon_g_per_kwh", "gpu_tdp_w"):
            value = getattr(self, name)
            if value is not None:
                _require_number(name, value, 0.0)
        _require_number("pue", self.pue, 1.0)
        if self.country is not None:
            carbon_g_per_kwh(str(self.country))

    @property
    def intensity_g_per_kwh(self) -> float | None:
        """Grams of CO2 equivalent a kWh, or None where nothing was set."""
        if self.carbon_g_per_kwh is not None or self.country is None:
            return self.carbon_g_per_kwh
        return carbon_g_per_kwh(self.country)


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What is guaranteed.

    Args:
        start: First day; the contract year is the one of its anniversaries that holds today.
            None: the last 365 days.
        share: Guaranteed share of failures with no lost progress.
        credit: Share of the fee due as credit where the guarantee is missed.
        fee_usd: The year's fee; None: the credit is shown as a share only.
    """

    start: datetime.date | None = None
    share: float = 0.9
    credit: float = 0.25
    fee_usd: float | None = None

    def __post_init__(self) -> None:
        if self.start is not None and type(self.start) is not datetime.date:
            raise ConfigError(f"contract start is {self.start!r}", hint="write start = 2026-01-01")
        for name in ("share", "credit"):
            _require_number(name, getattr(self, name), 0.0)
            if getattr(self, name) > 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}, more than 1")
        if self.fee_usd is not None:
            _require_number("fee_usd", self.fee_usd, 0.0)

    def year(self, now_wall_s: float) -> tuple[float, float]:
        """Return when the contract year that holds `now_wall_s` begins and ends, in UTC."""
        if self.start is None:
            return now_wall_s - 365 * 86400.0, now_wall_s
        today = datetime.datetime.fromtimestamp(now_wall_s, datetime.UTC).date()
        year = today.year - (_anniversary(self.start, today.year) > today)
        return _midnight(_anniversary(self.start, year)), _midnight(
            _anniversary(self.start, year + 1)
        )


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """One budget; see `trainonce.ledger.budget`.

    Args:
        name: Shown in alerts.
        metric: "cost_usd", "energy_kwh", "gpu_hours" or "hours" by the clock.
        limit: In the metric's unit, for one job.
        thresholds: Shares of the limit at which an alert is due.
        project: Applies to this project tag; "" for all.
        webhook: URL that gets a POST for each alert; "" for none.
        stop: Write a checkpoint and end the job when all of it is used up.
    """

    name: str
    metric: str
    limit: float
    thresholds: tuple[float, ...] = _THRESHOLDS
    project: str = ""
    webhook: str = ""
    stop: bool = False

    METRICS = ("cost_usd", "energy_kwh", "gpu_hours", "hours")

    def __post_init__(self) -> None:
        if self.metric not in self.METRICS:
            raise ConfigError(
                f"budget {self.name!r} has metric {self.metric!r}",
                hint="one of " + ", ".join(self.METRICS),
            )
        _require_number("limit", self.limit, 0.0, above=True)
        for threshold in self.thresholds:
            _require_number("threshold", threshold, 0.0)
        if self.webhook and not self.webhook.startswith(("http://", "https://")):
            raise ConfigError(f"webhook {self.webhook!r} is no http or https URL")


@dataclass(frozen=True, kw_only=True)
class EconomicsSettings:
    """All of the above, and the prices of single projects."""

    prices: Prices = field(default_factory=Prices)
    projects: dict[str, Prices] = field(default_factory=lambda: {})
    contract: Contract = field(default_factory=Contract)
    budgets: tuple[BudgetSettings, ...] = ()

    def prices_of(self, project: str) -> Prices:
        """Return the prices that hold for `project`."""
        return self.projects.get(project, self.prices)


def load(home: Path, flags: dict[str, Any] | None = None) -> EconomicsSettings:
    """Return the settings in `home`/settings.toml, with `flags` (of `Prices`) over them.

    Raises:
        ConfigError: The file is no TOML, or a value cannot be used; names it.
    """
    values = settings.read_file(home)
    over = {name: value for name, value in (flags or {}).items() if value is not None}
    economics = dict(settings.table(values, "economics"))
    projects = settings.table(economics, "projects")
    economics.pop("projects", None)
    budgets: Any = values.get("budget", [])
    if not isinstance(budgets, list):
        raise ConfigError(f"'budget' in settings.toml is {budgets!r}", hint="write [[budget]]")
    return EconomicsSettings(
        prices=settings.make(Prices, {**economics, **over}, "economics"),
        projects={
            name: settings.make(
                Prices,
                {**economics, **settings.table(projects, name), **over},
                f"economics.projects.{name}",
            )
            for name in projects
        },
        contract=settings.make(Contract, settings.table(values, "contract"), "contract"),
        budgets=tuple(_budget(each) for each in budgets),
    )


def _budget(values: Any) -> BudgetSettings:
    if not isinstance(values, dict):
        raise ConfigError(f"a budget in settings.toml is {values!r}", hint="write [[budget]]")
    thresholds: Any = values.get("thresholds", list(_THRESHOLDS))
    if not isinstance(thresholds, list):
        raise ConfigError(f"thresholds is {thresholds!r}", hint="write [0.5, 0.8, 1.0]")
    return settings.make(BudgetSettings, {**values, "thresholds": tuple(thresholds)}, "budget")


def _require_number(name: str, value: Any, least: float, *, above: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least or (above and value == least):
        wanted = "above" if above else "of at least"
        raise ConfigError(f"{name} is {value!r}", hint=f"a number {wanted} {least:g}")


def _anniversary(start: datetime.date, year: int) -> datetime.date:
    try:
        return datetime.date(year, start.month, start.day)
    except ValueError:  # 29 February
        return datetime.date(year, 3, 1)


def _midnight(day: datetime.date) -> float:
    return datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp()
