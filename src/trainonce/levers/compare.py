"""Whether two arms reach equal quality, and what the second one saves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.levers.usage import Usage

_CONFIDENCE = 0.95
MIN_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One finished run.

    Args:
        seed: Of initial weights and order.
        loss: The metric that decides; lower is better. May be infinite or NaN.
        metrics: Everything the task reports, the loss included.
        usage: What training used.
    """

    seed: int
    loss: float
    metrics: dict[str, float]
    usage: Usage

    def to_record(self) -> dict[str, Any]:
        """Return the run as plain values that JSON can hold; what is not finite is None."""
        return {
            "seed": self.seed,
            "metrics": {k: v if math.isfinite(v) else None for k, v in self.metrics.items()},
            "loss": self.loss if math.isfinite(self.loss) else None,
            "usage": self.usage.to_record(),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against a reference, seed by seed.

    Args:
        mean_difference: Loss of the arm less that of the reference, mean over seeds.
        upper_bound: One-sided upper 95 % bound of that mean (Student's t over paired seeds).
        margin: Fixed before any run.
        equal: The bound is within the margin: the arm is at least as good, up to the margin.
        saved: Share of the reference's usage saved, by kind; negative where it costs more.
    """

    mean_difference: float
    upper_bound: float
    margin: float
    equal: bool
    saved: dict[str, float]

    def to_record(self) -> dict[str, Any]:
        """Return the comparison as plain values that JSON can hold."""
        record = dataclasses.asdict(self)
        for name in ("mean_difference", "upper_bound"):
            record[name] = record[name] if math.isfinite(record[name]) else None
        return record


def upper_bound(differences: Sequence[float], confidence: float = _CONFIDENCE) -> float:
    """Return the one-sided upper bound of the mean of `differences`, by Student's t.

    Infinite where a difference is not finite, or there are fewer than two.
    """
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        return math.inf
    from scipy import stats  # half a second, and few callers need it

    mean = math.fsum(differences) / count
    variance = math.fsum((each - mean) ** 2 for each in differences) / (count - 1)
    quantile = float(stats.t.ppf(confidence, count - 1))
    return mean + quantile * math.sqrt(variance / count)


def compare(reference: Sequence[Trained], arm: Sequence[Trained], margin: float) -> Comparison:
    """Compare two arms trained on the same seeds.

    Raises:
        ConfigError: The seeds differ, or are fewer than five.
    """
    if [run.seed for run in reference] != [run.seed for run in arm]:
        raise ConfigError(
            "the arms were trained on different seeds, so their losses do not pair",
            hint="train both on the same seeds, in the same order",
        )
    if len(arm) < MIN_SEEDS:
        raise ConfigError(f"{len(arm)} seeds are too few to compare", hint=f"at least {MIN_SEEDS}")
    differences = [a.loss - r.loss for a, r in zip(arm, reference, strict=True)]
    bound = upper_bound(differences)
    finite = math.isfinite(bound)
    return Comparison(
        mean_difference=math.fsum(differences) / len(differences) if finite else math.nan,
        upper_bound=bound,
        margin=margin,
        equal=bound <= margin,
        saved=savings([run.usage for run in reference], [run.usage for run in arm]),
    )


def savings(reference: Sequence[Usage], arm: Sequence[Usage]) -> dict[str, float]:
    """Return the share of the reference's usage that the arm saves, summed over runs.

    By kind: flops, cpu_s, wall_s, samples, tokens, steps, and energy_j where it was measured
    on both sides. A kind that the reference did not use is left out.
    """
    found: dict[str, float] = {}
    for kind in ("flops", "cpu_s", "wall_s", "energy_j", "samples", "tokens", "steps"):
        theirs = [getattr(usage, kind) for usage in reference]
        ours = [getattr(usage, kind) for usage in arm]
        if None not in theirs and None not in ours and sum(theirs) > 0:
            found[kind] = 1 - (sum(ours) / len(ours)) / (sum(theirs) / len(theirs))
    return found


def mean_loss(runs: Sequence[Trained]) -> float:
    """Return the mean loss; infinite where a run's is not finite."""
    losses = [run.loss for run in runs]
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf
