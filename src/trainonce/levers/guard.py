"""Whether levers do harm: a run against the same run without them, at equal step."""

from __future__ import annotations

import enum
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Student's one-sided 95 % quantile by degrees of freedom, from 1.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)


class Verdict(enum.Enum):
    """What the guard says."""

    FINE = "fine"
    SWITCH_OFF = "switch off"
    REPORT = "report"


@dataclass(frozen=True, kw_only=True)
class GuardDecision:
    """What to do, to which levers, and why.

    Args:
        verdict: SWITCH_OFF where reversible levers are on, and this is the first time.
        levers: Which to switch off.
        reason: One sentence, with the figures.
    """

    verdict: Verdict
    levers: tuple[str, ...] = ()
    reason: str


def limit_of(off_arm: Sequence[float]) -> float:
    """Return the loss that one more run without levers would stay below, 19 times of 20.

    The one-sided prediction bound of Student's t over the seeds of the off-arm; infinite for
    fewer than two.
    """
    if len(off_arm) < 2 or not all(map(math.isfinite, off_arm)):
        return math.inf
    count = len(off_arm)
    quantile = _T95[min(count - 1, len(_T95)) - 1]
    spread = statistics.stdev(off_arm) * math.sqrt(1 + 1 / count)
    return statistics.fmean(off_arm) + quantile * spread


def judge(
    loss: float,
    off_arm: Sequence[float],
    *,
    step: int,
    reversible: Sequence[str],
    ramping: Sequence[str],
    fired: bool,
) -> GuardDecision:
    """Decide about the loss of a run at the step of the off-arm; pure.

    Args:
        loss: On the held-out samples, of the run with levers.
        off_arm: The same, of probes with every reversible lever off, one a seed. Empty: only
            a loss that is not finite counts.
        step: Updates made, for the reason.
        reversible: Levers that are on and may be switched off.
        ramping: Levers whose losses cannot be compared yet.
        fired: The guard has switched off once already.
    """
    limit = limit_of(off_arm)
    if math.isfinite(loss):
        if ramping:
            why = f"not compared at step {step}: {', '.join(ramping)} still ramps"
            return GuardDecision(verdict=Verdict.FINE, reason=why)
        if loss <= limit:
            why = f"held-out loss {loss:.4g} at step {step}, limit {limit:.4g}"
            return GuardDecision(verdict=Verdict.FINE, reason=why)
    why = (
        f"held-out loss {loss:.4g} at step {step} is beyond {limit:.4g}, the 95 % bound of "
        f"{len(off_arm)} runs without levers"
        if math.isfinite(loss)
        else f"the loss is {loss:g} at step {step}"
    )
    if fired:
        return GuardDecision(verdict=Verdict.REPORT, reason=f"{why}; levers are off already")
    if not reversible:
        return GuardDecision(verdict=Verdict.REPORT, reason=f"{why}; no reversible lever is on")
    return GuardDecision(verdict=Verdict.SWITCH_OFF, levers=tuple(reversible), reason=why)
