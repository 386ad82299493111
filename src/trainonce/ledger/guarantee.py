"""The guarantee: at least 90 % of unplanned failures are resolved with no lost progress."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scipy.special import betaincinv

from trainonce.events import Incident

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.ledger.facts import JobFacts
    from trainonce.ledger.prices import Contract

FAILURE = "failure"
CHAOS = "chaos"
PLANNED = "planned move"
USER_CODE = "exception in user code"
MISUSE = "misuse of trainonce"
UNSUPPORTED = "run without trainonce.init"
APART: tuple[str, ...] = (CHAOS, PLANNED, USER_CODE, MISUSE, UNSUPPORTED)

# An exception counts as a failure where it names the device, driver or fabric: the script
# is not to blame. Decided by what was raised, never by how it ended: that would flatter.
_DEVICE = re.compile(
    r"CUDA error|cudaError|CUDNN|CUBLAS|NCCL|HIP error|hipError|RCCL|uncorrectable ECC|"
    r"\bXid\b|device-side|NVLink",
    re.IGNORECASE,
)
_NOT_A_DEVICE = re.compile(r"out of memory|device-side assert", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """How the guarantee stands.

    Args:
        begin_wall_s: Start of the contract year.
        end_wall_s: Its end.
        n: Unplanned failures of supported runs in it.
        resolved: How many lost no progress.
        share: `resolved / n`; None where n is 0.
        low: Lower end of the 95 % Clopper-Pearson interval of the share.
        high: Its upper end.
        required: The guaranteed share.
        verdict: "kept", "missed" or "no failures".
        of_all: Over all jobs of the ledger; only then there can be a credit.
        credit_share: Share of the fee due as credit.
        credit_usd: That in money; None where the fee is not known, or not all jobs are.
        apart: What is not counted, by class.
        by_cause: Failures by cause: (n, resolved).
    """

    begin_wall_s: float
    end_wall_s: float
    n: int
    resolved: int
    share: float | None
    low: float
    high: float
    required: float
    verdict: str
    of_all: bool
    credit_share: float
    credit_usd: float | None
    apart: dict[str, int]
    by_cause: dict[str, tuple[int, int]] = field(default_factory=lambda: {})


def classify(incident: Incident) -> str:
    """Return which class an incident belongs to: only `FAILURE` counts."""
    if incident.chaos:
        return CHAOS
    if incident.planned:
        return PLANNED
    if not incident.supported:
        return UNSUPPORTED
    if incident.cause == "misuse":
        return MISUSE
    if incident.cause == "exception" and (
        not _DEVICE.search(incident.detail) or _NOT_A_DEVICE.search(incident.detail)
    ):
        return USER_CODE
    return FAILURE


def is_resolved(incident: Incident) -> bool:
    """Tell whether no progress was lost.

    It was served, no committed step was computed again, and the newcomer received what the
    donor gave.
    """
    same = (
        not incident.digest_before
        or not incident.digest_after
        or incident.digest_before == incident.digest_after
    )
    return incident.served_by != "none" and incident.steps_lost == 0 and same


def lost_launcher(facts: JobFacts, others: Sequence[JobFacts]) -> Incident | None:
    """Return the incident that a lost job could not report itself.

    None where the job was not lost, or where a later job that resumed from one of its
    checkpoints reported it. It counts as served where a later job resumed.
    """
    if facts.summary.outcome != "lost":
        return None
    paths = {checkpoint.path for checkpoint in facts.checkpoints}
    heirs = [other for other in others if other.resumed_from in paths]
    if any(one.cause == "launcher" for heir in heirs for one in heir.incidents):
        return None
    saved = max((checkpoint.step for checkpoint in facts.checkpoints), default=facts.start_step)
    last_fault = facts.faults[-1].fault if facts.faults else ""
    return Incident(
        incident=len(facts.incidents) + 1,
        ranks=list(range(facts.summary.world_size)),
        cause="launcher",
        detail="no word of the end",
        detected_by="ledger",
        served_by="checkpoint" if heirs else "none",
        step=facts.end_step,
        generation=0,
        chaos=last_fault.startswith("kill_launcher"),
        supported=facts.formed_s is not None,
        steps_lost=max(0, facts.end_step - saved),
        wall_s=facts.started_wall_s + facts.elapsed_s,
    )


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper and Pearson, Biometrika 1934).

    Args:
        k: Successes.
        n: Trials, at least 1.
        confidence: Of the two-sided interval.
    """
    tail = (1.0 - confidence) / 2.0
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1.0 - tail)) if k < n else 1.0
    return low, high


def judge(
    incidents: Sequence[Incident], contract: Contract, now_wall_s: float, *, of_all: bool = True
) -> Guarantee:
    """Return how the guarantee stands over the contract year that holds `now_wall_s`.

    Args:
        incidents: Of the jobs that were chosen.
        contract: What is guaranteed.
        now_wall_s: The present, seconds since the epoch.
        of_all: Whether all jobs were.
    """
    begin_wall_s, end_wall_s = contract.year(now_wall_s)
    within = [one for one in incidents if begin_wall_s <= one.wall_s <= end_wall_s]
    counted = [one for one in within if classify(one) == FAILURE]
    apart: dict[str, int] = dict.fromkeys(APART, 0)
    by_cause: dict[str, tuple[int, int]] = {}
    for one in within:
        if classify(one) != FAILURE:
            apart[classify(one)] += 1
    for one in counted:
        total, good = by_cause.get(one.cause, (0, 0))
        by_cause[one.cause] = (total + 1, good + is_resolved(one))
    n, resolved = len(counted), sum(map(is_resolved, counted))
    low, high = clopper_pearson(resolved, n) if n else (0.0, 1.0)
    # Compared as whole failures, so that 9 of 10 keeps 90 % whatever floats make of it.
    missed = n > 0 and resolved < contract.share * n - 1e-9
    credit_share = contract.credit if missed and of_all else 0.0
    fee_usd = contract.fee_usd if of_all else None
    return Guarantee(
        begin_wall_s=begin_wall_s,
        end_wall_s=end_wall_s,
        n=n,
        resolved=resolved,
        share=resolved / n if n else None,
        low=low,
        high=high,
        required=contract.share,
        verdict="no failures" if n == 0 else "missed" if missed else "kept",
        of_all=of_all,
        credit_share=credit_share,
        credit_usd=None if fee_usd is None else credit_share * fee_usd,
        apart=apart,
        by_cause=by_cause,
    )
