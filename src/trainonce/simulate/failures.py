"""What fails, how often, and how: published rates, and the trace one seed draws from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DAY_S = 86_400.0
HOUR_S = 3_600.0
# Failures a node-day: one in 2.7 million years, one in nine seconds.
_RATE_MIN, _RATE_MAX = 1e-9, 1e4


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One kind of failure.

    Args:
        name: As published.
        count: How often it was seen in the published record; only ratios matter.
        loses_node: Whether the node has to be reset or repaired before it can work again.
        permanent: Share of these failures that need a repair rather than a reset.
        predictable: Share that gives a warning in time for a planned migration.
        silent: Share that shows as a hang, not as a process that exits.
    """

    name: str
    count: int
    loses_node: bool = True
    permanent: float = 0.3
    predictable: float = 0.2
    silent: float = 0.0


# Counts: "The Llama 3 Herd of Models" (Llama Team, Meta, 2024), table 5: the 419 unexpected
# interruptions of 54 days on 16,384 GPUs. The other columns are not published by cause; they are
# chosen so that about 30 % need a repair and 20-30 % give a warning, which is what operators
# report overall (Lablup saw 2 of 10 before the XID).
CAUSES = (
    Cause(name="GPU", count=148, permanent=0.35, predictable=0.25, silent=0.2),
    Cause(name="GPU HBM", count=72, permanent=0.4, predictable=0.35),
    Cause(name="software", count=54, loses_node=False, permanent=0.0, predictable=0.0, silent=0.3),
    Cause(name="network switch or cable", count=35, permanent=0.3, silent=0.5),
    Cause(name="host maintenance", count=32, permanent=0.5, predictable=0.5),
    Cause(name="GPU SRAM", count=19, predictable=0.25),
    Cause(name="GPU system processor", count=17, predictable=0.1),
    Cause(name="NIC", count=7, permanent=0.4),
    Cause(name="collective watchdog", count=7, permanent=0.1, predictable=0.0, silent=1.0),
    Cause(name="silent data corruption", count=6, permanent=0.5, predictable=0.0, silent=1.0),
    Cause(name="GPU thermal interface or sensor", count=6, permanent=0.5, predictable=0.8),
    Cause(name="SSD", count=3, permanent=0.8, predictable=0.3),
    Cause(name="power supply", count=3, permanent=0.8, predictable=0.3),
    Cause(name="chassis", count=2, permanent=0.8, predictable=0.0),
    Cause(name="IO board", count=2, permanent=0.8, predictable=0.0),
    Cause(name="dependency", count=2, loses_node=False, permanent=0.0, predictable=0.0),
    Cause(name="CPU", count=2, permanent=0.8, predictable=0.0),
    Cause(name="system memory", count=2, permanent=0.8, predictable=0.3),
)


@dataclass(frozen=True, kw_only=True)
class FailureRates:
    """How many failures a node has a day, which may depend on the size of the job.

    Args:
        name: How it is chosen on the command line.
        source: Where the figures come from.
        points: (GPUs, failures per node-day), by growing size. Between two points the rate is
            interpolated in log-log; outside it stays at the nearest point.
    """

    name: str
    source: str
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points or any(n < 1 or not _RATE_MIN <= r <= _RATE_MAX for n, r in self.points):
            raise ConfigError(
                f"failure rates {self.name!r} need a rate of {_RATE_MIN:g} to {_RATE_MAX:g} at "
                f"each size: {self.points}",
                hint="a node fails 0.002 to 0.03 times a day in the published records",
            )

    def per_node_day(self, num_gpus: int) -> float:
        """Failures per node-day of a job on `num_gpus` GPUs."""
        sizes = np.log([n for n, _ in self.points])
        rates = np.log([r for _, r in self.points])
        return float(np.exp(np.interp(math.log(num_gpus), sizes, rates)))

    def mttf_s(self, num_gpus: int, gpus_per_node: int) -> float:
        """Mean time to failure of a job that any node stops, in seconds."""
        return DAY_S / (self.per_node_day(num_gpus) * num_gpus / gpus_per_node)


def _flat(name: str, rate: float, source: str) -> FailureRates:
    return FailureRates(name=name, source=source, points=((1, rate),))


_KOKOLIS = "Kokolis et al., Revisiting Reliability in Large-Scale ML Research Clusters, HPCA 2025"
_LLAMA3 = 419 / (54 * 2048)

# Three published rates, and the curve through the mean times to failure that were measured. The
# flat RSC rates are those the paper projects large jobs from; its own measurement at 1,024 GPUs
# (7.9 h) is 3.6 times as frequent, because small jobs fail for other reasons too.
RATES: dict[str, FailureRates] = {
    rates.name: rates
    for rates in (
        _flat("rsc-1", 6.5e-3, f"{_KOKOLIS}: RSC-1, 16,384 A100"),
        _flat("rsc-2", 2.34e-3, f"{_KOKOLIS}: RSC-2, 8,192 A100"),
        _flat("llama3", _LLAMA3, "Llama 3 (Meta, 2024): 419 in 54 days on 16,384 H100"),
        FailureRates(
            name="by-scale",
            source=f"measured: 47.7 days at 8 GPUs, 7.9 h at 1,024 ({_KOKOLIS}); Llama 3 at 16,384",
            points=((8, 1 / 47.7), (1024, 24 / (128 * 7.9)), (16_384, _LLAMA3)),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything that happens to the nodes of one job, drawn before the job is simulated.

    The policies of a comparison see the same trace, so that their difference is not luck.
    All arrays are 1-D and equally long, in the order of `time_s`.
    """

    time_s: NDArray[np.float64]
    cause: NDArray[np.int64]
    permanent: NDArray[np.bool_]
    predictable: NDArray[np.bool_]
    silent: NDArray[np.bool_]
    place: NDArray[np.float64]  # in [0, 1): which of the job's nodes
    luck: NDArray[np.float64]  # in [0, 1): whether a recovery from living copies works
    repair: NDArray[np.float64]  # the repair's length, in means

    def __len__(self) -> int:
        return len(self.time_s)


def arrivals(rng: np.random.Generator, rate_per_s: float, duration_s: float) -> NDArray[np.float64]:
    """Draw the sorted times of a Poisson process over `duration_s` seconds."""
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(rate_per_s * duration_s)))


def draw_trace(
    rng: np.random.Generator,
    *,
    rate_per_s: float,
    duration_s: float,
    causes: tuple[Cause, ...] = CAUSES,
) -> Trace:
    """Draw the failures of one job: a Poisson process, each failure with a cause and its fate."""
    time_s = arrivals(rng, rate_per_s, duration_s)
    n = len(time_s)
    weights = np.array([cause.count for cause in causes], dtype=np.float64)
    cause = rng.choice(len(causes), size=n, p=weights / weights.sum())

    def happens(shares: list[float]) -> NDArray[np.bool_]:
        return rng.random(n) < np.array(shares)[cause]

    return Trace(
        time_s=time_s,
        cause=cause,
        permanent=happens([c.permanent for c in causes]),
        predictable=happens([c.predictable for c in causes]),
        silent=happens([c.silent for c in causes]),
        place=rng.random(n),
        luck=rng.random(n),
        repair=rng.exponential(size=n),
    )
