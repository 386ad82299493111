"""How long a run is and in which batches, and why: what was asked for, and what changes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.ledger import prices
from trainonce.levers import gates

if TYPE_CHECKING:
    from trainonce.ledger.spending import Budget
    from trainonce.levers.batches import Data
    from trainonce.levers.fingerprint import Fingerprint
    from trainonce.levers.plan_file import LeverPlan

_BATCH_SIZE, _LEAST_UPDATES = 32, 16


@dataclass(frozen=True)
class RunLength:
    """So many updates, and why.

    Args:
        steps: At least one.
        why: In half a sentence.
    """

    steps: int
    why: str


def choose_batch_size(data: Data, world_size: int) -> tuple[int, str]:
    """Return the samples of an update, and why; a multiple of the number of ranks."""
    if data.batch_size is not None:
        wanted, why = data.batch_size, "the batch size is the loader's"
    else:
        wanted = min(_BATCH_SIZE, max(len(data) // _LEAST_UPDATES, 1))
        why = f"nobody gave a batch size: {_BATCH_SIZE}, or what makes {_LEAST_UPDATES} an epoch"
    if len(data) < world_size:
        raise ConfigError(
            f"{len(data)} samples are too few for {world_size} ranks", hint="use fewer ranks"
        )
    size = min(max(wanted // world_size, 1) * world_size, len(data) // world_size * world_size)
    return size, why if size == wanted else f"{why}, {size} to fit data and ranks"


def asked_length(
    data: Data, batch_size: int, fingerprint: Fingerprint, steps: int | None, epochs: float | None
) -> RunLength:
    """Return the length that the caller asked for, or what is common for such a task.

    Raises:
        ConfigError: Two lengths, what is no number, or nothing to do.
    """
    if steps is not None and epochs is not None:
        raise ConfigError("steps and epochs were both given", hint="give one of them")
    if isinstance(steps, str) or isinstance(epochs, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"{steps=} and {epochs=} are no numbers", hint="steps=100, not '100'")
    why = "the length is the caller's"
    if steps is None and epochs is None:
        epochs = 1 if fingerprint.task == "language-model" else 3 if fingerprint.pretrained else 10
        why = f"nobody gave a length: {epochs} passes over the data"
    if epochs is not None and not math.isfinite(epochs):
        raise ConfigError(f"{epochs=} is no length", hint="a number of passes over the data")
    if steps is None:
        assert epochs is not None
        steps = max(round(epochs * len(data) / batch_size), 1) if epochs > 0 else 0
    if steps < 1:
        raise ConfigError(f"{steps=} and {epochs=} leave nothing to do", hint="at least one update")
    return RunLength(steps, why)


def within_budget(budget: Budget, length: RunLength, step_s: float, world_size: int) -> RunLength:
    """Cut the run to what the budget allows, at the step time that the probes measured."""
    if not step_s:
        return length
    hours = [budget.max_hours] if budget.max_hours is not None else []
    price = prices.load(settings.home()).prices.usd_per_gpu_hour
    if budget.max_cost_usd is not None and price:
        hours.append(budget.max_cost_usd / (price * world_size))
    if not hours:
        return length
    most = int(0.9 * min(hours) * 3600 / step_s)  # a tenth for evaluations and the rest
    if most >= length.steps:
        return length
    if most < 1:
        raise ConfigError(
            f"the budget allows {min(hours):.3g} hours, and one update takes {step_s:.3g} s",
            hint="raise the budget",
        )
    return RunLength(most, f"cut from {length.steps} updates to what the budget allows")


def without_pruned(length: RunLength, levers: dict[str, LeverPlan]) -> RunLength:
    """Leave out the updates that InfoBatch saves, where it is on."""
    if not levers["infobatch"].on:
        return length
    share = gates.infobatch_share(levers["infobatch"].settings)
    why = f"{length.why}, and InfoBatch needs about {share:.0%} of {length.steps} updates"
    return RunLength(max(round(share * length.steps), 1), why)
