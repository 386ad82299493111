"""Choices made by short training runs: the learning rate, and the length of the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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


# Rate times width in a run of 500 updates, the largest rate to expect, and the share of it for
# models that were trained before. The first was fitted to the tuning tasks of benchmarks/rates.
_RATE_OF_ONE_INPUT, _UPDATES, _MOST, _PRETRAINED = 1.28, 500, 0.05, 0.1
_LENGTH_EXPONENT = 0.32
# Samples over passes below which a rate is lowered, and by how much at most.
_SCARCE, _LEAST_SHARE = 40, 0.1


def expected_rate(
    model: torch.nn.Module,
    steps: int,
    *,
    pretrained: bool = False,
    samples: int | None = None,
    epochs: float = 1.0,
) -> float:
    """Return the peak rate of AdamW (or `muon_adamw`) to expect of a model in a run of `steps`.

    Inversely as the width: a matrix with more inputs changes its output more at the same rate
    (Yang et al., Tensor Programs V, 2022). The width is the mean number of inputs, or of input
    channels, over the elements of all trained matrices but embeddings. And lower for a longer
    run, by its 0.32th power (Bjorck et al., Scaling Optimal LR Across Token Horizons, ICLR 2025).

    A small table that is seen many times is learned by heart, and the sooner the higher the rate:
    it is lowered by the square of samples over passes, from 40 down (benchmarks/rates).

    Args:
        model: Not trained yet, unless it is `pretrained`.
        steps: Updates of the run.
        pretrained: It was trained before: a tenth of the rate.
        samples: Of the dataset; None: as many as it takes.
        epochs: Passes over them.
    """
    embedded = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
    }
    matrices = [
        p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and id(p) not in embedded
    ]
    elements = sum(p.numel() for p in matrices)
    width = sum(p.numel() * p.shape[1] for p in matrices) / elements if elements else 1.0
    rate = _RATE_OF_ONE_INPUT / width * (_UPDATES / max(steps, 1)) ** _LENGTH_EXPONENT
    share = 1.0
    if samples is not None:
        share = min(max((samples / max(epochs, 1.0) / _SCARCE) ** 2, _LEAST_SHARE), 1.0)
    return float(f"{min(rate, _MOST) * share * (_PRETRAINED if pretrained else 1.0):.3g}")


@describes(
    LeverInfo(
        name="rate-probe",
        saves="makes the other savings possible: compare nothing at a rate that suits one side",
        source="common practice; Kaddour et al., No Train No Gain, NeurIPS 2023",
        applies="always; some percent of the run, counted as tuning",
        hurts="a probe much shorter than the run shows mostly noise: ask for a `least_gain` then",
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
    least_gain: float = 0.0,
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
        least_gain: Stay at `start` unless the best loss is lower by this share: what is known
            beforehand outweighs the noise of short runs.

    Raises:
        ConfigError: The arguments make no ladder, or no rate trains at all.
    """
    if not 0 < start < math.inf or not factor > 1 or max_runs < 1 or least_gain < 0:
        raise ConfigError(
            f"no ladder of rates has {start=}, {factor=}, {max_runs=}, {least_gain=}",
            hint="start > 0, factor > 1, max_runs >= 1, least_gain >= 0",
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
    if best and math.isfinite(losses[0]) and losses[best] > losses[0] - least_gain * abs(losses[0]):
        reason = f"{start:g} to begin with: none of {len(losses)} runs is {least_gain:.0%} better"
        return Choice(value=start, loss=losses[0], reason=reason, tried=tried)
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
