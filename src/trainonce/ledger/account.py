"""Where the time of a job went.

ETTR, effective training time ratio, is the productive share of a job's wall-clock time
(Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters",
HPCA 2025). The causes of lost time are defined in docs/ledger.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.ledger.facts import since_start

if TYPE_CHECKING:
    from trainonce.events import Incident
    from trainonce.ledger.facts import JobFacts

CAUSES: tuple[str, ...] = (
    "start-up", "detection", "pause", "waiting for a worker", "recompute in flight",
    "rollback", "checkpoint blocking",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TimeAccount:
    """The seconds of one job.

    Args:
        elapsed_s: From beginning to end.
        lost_s: Seconds by cause, one entry for each of `CAUSES`.
        productive_s: What is left of `elapsed_s`.
        ettr: `productive_s / elapsed_s`; None where nothing elapsed, and for a plain script.
        goodput: Committed steps times the median step time, over `elapsed_s`, at most 1;
            None where no step time is known.
        mfu: Operations of committed steps over what the ranks' devices can do in `elapsed_s`;
            None where either is not known.
        samples_per_s: Samples of committed steps over `elapsed_s`.
    """

    elapsed_s: float
    lost_s: dict[str, float]
    productive_s: float
    ettr: float | None
    goodput: float | None
    mfu: float | None
    samples_per_s: float


def account(facts: JobFacts) -> TimeAccount:
    """Return where the time of the job went."""
    elapsed_s = facts.elapsed_s
    lost_s = dict.fromkeys(CAUSES, 0.0)
    lost_s["start-up"] = min(elapsed_s, _startup_s(facts))
    covered_s = lost_s["start-up"]
    for begin_s, end_s, incident in sorted(
        (_span(facts, incident) for incident in facts.incidents), key=lambda each: each[:2]
    ):
        # What another incident (or the start-up) has already been charged for counts once.
        fresh_s = max(0.0, min(end_s, elapsed_s) - max(begin_s, covered_s))
        covered_s = max(covered_s, min(end_s, elapsed_s))
        if end_s > begin_s:
            for cause, part_s in _parts(incident, facts.step_s).items():
                lost_s[cause] += part_s * fresh_s / (end_s - begin_s)
    lost_s["rollback"] = sum(one.steps_lost for one in facts.incidents) * facts.step_s
    lost_s["checkpoint blocking"] = sum(one.blocked_s for one in facts.checkpoints)
    productive_s = max(0.0, elapsed_s - sum(lost_s.values()))
    num_steps = facts.end_step - facts.start_step
    useful_s = num_steps * facts.step_s
    could = elapsed_s * facts.peak_flops
    return TimeAccount(
        elapsed_s=elapsed_s,
        lost_s=lost_s,
        productive_s=productive_s,
        ettr=productive_s / elapsed_s if elapsed_s and facts.supported else None,
        goodput=min(1.0, useful_s / elapsed_s) if elapsed_s and facts.step_s else None,
        mfu=num_steps * facts.flops_per_step / could if could and facts.flops_per_step else None,
        samples_per_s=facts.samples / elapsed_s if elapsed_s else 0.0,
    )


def _startup_s(facts: JobFacts) -> float:
    if not facts.supported:
        return 0.0  # it never says that it has begun
    if facts.formed_s is not None:
        return facts.formed_s
    if facts.progress:
        return facts.progress[0][0]
    return facts.elapsed_s


def _span(facts: JobFacts, incident: Incident) -> tuple[float, float, Incident]:
    """Return when an incident began, which may be long before it was seen, and when it ended."""
    at_s = since_start(facts, incident)
    return at_s - incident.detected_s, at_s + incident.pause_s, incident


def _parts(incident: Incident, step_s: float) -> dict[str, float]:
    """Split an incident's seconds by cause; they add up to detection and pause."""
    waiting_s = min(incident.waited_for_spare_s, incident.pause_s)
    rest_s = incident.pause_s - waiting_s
    again_s = min(incident.micro_batches_recomputed * step_s, rest_s)
    return {
        "detection": incident.detected_s,
        "waiting for a worker": waiting_s,
        "recompute in flight": again_s,
        "pause": rest_s - again_s,
    }
