"""Choices made by short training runs: the learning rate, and the length of the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError
from trainonce.levers.base import LeverInfo, describes

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a probe chose.

    Args:
        value: The rate, or the number of steps.
        loss: What it reached.
        reason: Why, in one sentence.
        tried: Value to loss of everything that was run; that is what the choice cost.
    """

    value: float
    loss: float
    reason: str
    tried: dict[float, float]


@describes(
    LeverInfo(
        name="rate-probe",
        saves="makes the other savings possible: compare nothing at a rate that suits one side",
        source="common practice; Kaddour et al., No Train No Gain, NeurIPS 2023",
        applies="always; some percent of the run, counted as tuning",
        hurts="a probe much shorter than the run prefers rates that are too high",
        reversible=True,
        default_on=True,
    )
)
def rate_probe(
    train: Callable[[float], float],
    start: float,
    *,
    factor: float = 2.0,
    max_runs: int = 8,
) -> Choice:
    """Find the learning rate with the lowest loss, by short runs outward from a guess.

    The loss over the logarithm of the rate has one valley: the probe walks downhill by
    `factor` from `start` until both neighbours of the best are worse.

    Args:
        train: Trains from the same start with a finished schedule, some percent of the real
            length, and returns the loss on data not trained on. Infinite or NaN says
            diverged. Equal weights and batches for every rate make the losses comparable.
        start: First guess.
        factor: Distance between rates, above 1.
        max_runs: At most so many calls of `train`.

    Raises:
        ConfigError: The arguments make no ladder, or no rate trains at all.
    """
    if start <= 0 or factor <= 1 or max_runs < 1:
        raise ConfigError(
            f"no ladder of rates has {start=}, {factor=}, {max_runs=}",
            hint="start > 0, factor > 1, max_runs >= 1",
        )
    losses: dict[int, float] = {}

    def run(rung: int) -> float:
        if rung not in losses:
            loss = train(start * factor**rung)
            losses[rung] = loss if math.isfinite(loss) else math.inf
        return losses[rung]

    run(0)
    while len(losses) < max_runs:
        best = min(losses, key=lambda rung: (losses[rung], rung))
        if math.isinf(losses[best]):
            wanted = [min(losses) - 1]  # everything diverged so far: go lower
        else:
            wanted = [r for r in (best + 1, best - 1) if r not in losses]
        if not wanted:
            break
        run(wanted[0])
    best = min(losses, key=lambda rung: (losses[rung], rung))
    tried = {start * factor**rung: losses[rung] for rung in sorted(losses)}
    if math.isinf(losses[best]):
        raise ConfigError(
            f"training diverged at every rate from {min(tried):g} to {max(tried):g}",
            hint="check the loss and the data, or start lower",
        )
    bracketed = best - 1 in losses and best + 1 in losses
    rate = start * factor**best
    reason = (
        f"{rate:g} has the lowest loss of {len(losses)} runs"
        f"{', and both neighbours are worse' if bracketed else '; the edge of what was tried'}"
    )
    return Choice(value=rate, loss=losses[best], reason=reason, tried=tried)


@describes(
    LeverInfo(
        name="horizon",
        saves="whatever the customary length is too long by",
        source="Hägele et al., NeurIPS 2024",
        applies="the same training is repeated, or a target quality is known",
        hurts="one single run: the ladder costs more than it saves",
        reversible=True,
        default_on=False,
    )
)
def horizon_ladder(
    train: Callable[[int], float],
    target: float,
    longest: int,
    *,
    shortest: int | None = None,
    factor: float = 1.5,
) -> Choice:
    """Find the shortest schedule that reaches a target loss, from short to long.

    Each rung is a run with a schedule of its own that ends in its decay: the loss in the
    middle of a longer run says nothing about a shorter one.

    Args:
        train: Trains for so many steps (or epochs, or tokens) and returns the loss.
        target: Reached if the loss is at most this.
        longest: Longest schedule to try.
        shortest: First one to try; a sixteenth of `longest` if None.
        factor: Growth from rung to rung, above 1.

    Returns:
        The first rung that reaches the target, or the best one where none does: `reason`
        says which.

    Raises:
        ConfigError: The arguments make no ladder, or every run diverged.
    """
    first = max(longest // 16, 1) if shortest is None else shortest
    if not 1 <= first <= longest or factor <= 1:
        raise ConfigError(
            f"no ladder of lengths has {shortest=}, {longest=}, {factor=}",
            hint="1 <= shortest <= longest, factor > 1",
        )
    tried: dict[float, float] = {}
    length = first
    while True:
        loss = train(length)
        tried[length] = loss if math.isfinite(loss) else math.inf
        if loss <= target:
            reason = f"{length} is the shortest of {len(tried)} tried that reaches {target:g}"
            return Choice(value=length, loss=loss, reason=reason, tried=tried)
        if length == longest:
            break
        length = min(max(length + 1, round(length * factor)), longest)
    best = min(tried, key=lambda value: (tried[value], value))
    if math.isinf(tried[best]):
        raise ConfigError("training diverged at every length", hint="probe the rate first")
    reason = f"none of {len(tried)} lengths reaches {target:g}; {best:g} came closest"
    return Choice(value=best, loss=tried[best], reason=reason, tried=tried)
