"""The report: everything that `trainonce report` shows, as plain values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import JobNotFoundError
from trainonce.ledger.account import TimeAccount, account
from trainonce.ledger.economics import Economics, economics
from trainonce.ledger.facts import JobFacts, gather
from trainonce.ledger.guarantee import Guarantee, classify, is_resolved, judge, lost_launcher
from trainonce.ledger.words import count, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.events import Incident
    from trainonce.ledger.prices import EconomicsSettings
    from trainonce.ledger.reading import JobSummary
    from trainonce.ledger.store import Ledger


@dataclass(frozen=True, kw_only=True)
class IncidentReport:
    """One incident: the event, and what it counts as."""

    event: Incident
    counts_as: str
    resolved: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """One job."""

    facts: JobFacts
    time: TimeAccount
    economics: Economics
    incidents: list[IncidentReport]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over jobs. Ratios are weighted by ranks times seconds; None where unknown."""

    jobs: int
    gpu_hours: float
    ettr: float | None
    goodput: float | None
    mfu: float | None
    lost_gpu_hours: float
    lost_gpu_hours_by_cause: dict[str, float]
    cost_usd: float | None
    lost_cost_usd: float | None
    spare_cost_usd: float | None
    saved_gpu_hours: float
    saved_cost_usd: float | None
    graph_saved_gpu_hours: float
    graph_saved_cost_usd: float | None
    graph_saved_j: float
    it_kwh: float | None
    facility_kwh: float | None
    co2_kg: float | None
    energy_is_estimate: bool
    jobs_without_energy: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it.

    Args:
        ledger: Path of the ledger.
        generated_wall_s: When.
        jobs: Newest first.
        guarantee: Over the jobs shown.
        totals: Over the jobs shown.
        by_project: The same by project tag.
        num_unknown: Rows passed over because a newer version wrote them.
    """

    ledger: str
    generated_wall_s: float
    jobs: list[JobReport]
    guarantee: Guarantee
    totals: Totals
    by_project: dict[str, Totals]
    num_unknown: int


def build(
    ledger: Ledger,
    settings: EconomicsSettings,
    now_wall_s: float,
    *,
    job: str | None = None,
    project: str | None = None,
    since_wall_s: float | None = None,
) -> Report:
    """Return the report over the jobs that fit.

    Args:
        ledger: Where the events are.
        settings: Prices and contract.
        now_wall_s: The present, seconds since the epoch.
        job: One job: its id, the beginning of it, or "last".
        project: Only jobs with this tag.
        since_wall_s: Only jobs that began then or later.

    Raises:
        JobNotFoundError: `job` fits none or several.
        LedgerError: The ledger cannot be read.
    """
    with ledger.reading() as view:
        summaries = view.jobs()
        fitting = [
            one
            for one in summaries
            if (project is None or one.project == project)
            and (since_wall_s is None or one.started_wall_s >= since_wall_s)
        ]
        chosen = fitting if job is None else [find_job(fitting, job, ledger)]
        # A job that resumed from a lost one may lie outside the choice.
        names = {one.job for one in chosen}
        if any(one.outcome == "lost" for one in chosen):
            names = {one.job for one in summaries}
        facts = {
            one.job: gather(one, view.events(one.job), now_wall_s)
            for one in summaries
            if one.job in names
        }
    jobs = [_job(facts[one.job], list(facts.values()), settings) for one in chosen]
    by_project: dict[str, list[JobReport]] = {}
    for one in jobs:
        by_project.setdefault(one.facts.summary.project, []).append(one)
    return Report(
        ledger=str(ledger.path),
        generated_wall_s=now_wall_s,
        jobs=jobs,
        guarantee=judge(
            [incident.event for one in jobs for incident in one.incidents],
            settings.contract,
            now_wall_s,
        ),
        totals=_totals(jobs),
        by_project={name: _totals(some) for name, some in sorted(by_project.items())},
        num_unknown=ledger.num_unknown,
    )


def find_job(summaries: Sequence[JobSummary], text: str, ledger: Ledger) -> JobSummary:
    """Return the job that `text` names: its id, the beginning of it, or "last".

    Args:
        summaries: To choose from, newest first.
        text: What the user wrote.
        ledger: For the error's words.

    Raises:
        JobNotFoundError: None fits, or several do.
    """
    if not summaries:
        raise JobNotFoundError(
            f"there are no jobs to choose {text!r} from in {ledger.path}",
            hint="start one with `trainonce run`, or set TRAINONCE_HOME to where it ran",
        )
    exact = [one for one in summaries if one.job == text]
    if text == "last" and not exact:
        return summaries[0]
    found = exact or [one for one in summaries if one.job.startswith(text)]
    if len(found) == 1:
        return found[0]
    some = ", ".join(one.job for one in (found or summaries)[:5])
    if found:
        raise JobNotFoundError(
            f"{len(found)} jobs begin with {text!r}", hint=f"write more of it: {some}"
        )
    raise JobNotFoundError(f"no job {text!r} in {ledger.path}", hint=f"the latest are {some}")


def sentence(incident: Incident) -> str:
    """Return what happened, in one sentence."""
    ranks = ", ".join(map(str, incident.ranks)) or "?"
    who = f"rank{'s' if len(incident.ranks) > 1 else ''} {ranks}"
    if incident.host:
        who += f" on {incident.host}"
    event = "moved" if incident.planned else "failed"
    served = "not served" if incident.served_by == "none" else f"served by {incident.served_by}"
    words = [
        (f"step {incident.step}: {who} {event} ({incident.cause}: {one_line(incident.detail)}), "
        f"seen by {incident.detected_by} after {incident.detected_s:.2f} s; {served}"),
        f"pause {incident.pause_s:.3f} s"
        + (f", {incident.waited_for_spare_s:.2f} s of it waiting for a worker"
           if incident.waited_for_spare_s else ""),
        count(incident.steps_lost, "committed step") + " lost",
        count(incident.micro_batches_recomputed, "micro-batch", "es") + " recomputed",
        f"{_bytes(incident.bytes_moved)} moved",
    ]  # fmt: skip
    if incident.digest_before or incident.digest_after:
        same = incident.digest_before == incident.digest_after
        before, after = incident.digest_before[:12] or "?", incident.digest_after[:12] or "?"
        words.append(
            f"digest {before} on both sides" if same else f"digest {before} became {after}"
        )
    return ", ".join(words)


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values that strict JSON can hold."""
    values: dict[str, Any] = _plain(dataclasses.asdict(report))
    for job in values["jobs"]:
        # The raw material of plots and accounts: `Ledger.events` has it.
        for name in ("progress", "incidents", "checkpoints", "faults", "saved", "energy", "levers"):
            job["facts"].pop(name)
    return values


def _job(facts: JobFacts, others: list[JobFacts], settings: EconomicsSettings) -> JobReport:
    implied = lost_launcher(facts, [other for other in others if other is not facts])
    if implied is not None:
        facts = dataclasses.replace(facts, incidents=[*facts.incidents, implied])
    time = account(facts)
    return JobReport(
        facts=facts,
        time=time,
        economics=economics(facts, time, settings.prices_of(facts.summary.project)),
        incidents=[
            IncidentReport(
                event=one,
                counts_as=classify(one),
                resolved=is_resolved(one),
                sentence=sentence(one),
            )
            for one in facts.incidents
        ],
    )


def _totals(jobs: Sequence[JobReport]) -> Totals:
    money = [one.economics for one in jobs]
    energies = [one.energy for one in money if one.energy.it_kwh is not None]
    by_cause: dict[str, float] = {}
    for one in jobs:
        for cause, lost_s in one.time.lost_s.items():
            lost = lost_s * one.facts.summary.world_size / 3600.0
            by_cause[cause] = by_cause.get(cause, 0.0) + lost
    return Totals(
        jobs=len(jobs),
        gpu_hours=sum(one.gpu_hours for one in money),
        ettr=_weighted(jobs, [one.time.ettr for one in jobs]),
        goodput=_weighted(jobs, [one.time.goodput for one in jobs]),
        mfu=_weighted(jobs, [one.time.mfu for one in jobs]),
        lost_gpu_hours=sum(one.lost_gpu_hours for one in money),
        lost_gpu_hours_by_cause=by_cause,
        cost_usd=_sum([one.cost_usd for one in money]),
        lost_cost_usd=_sum([one.lost_cost_usd for one in money]),
        spare_cost_usd=_sum([one.spare_cost_usd for one in money]),
        saved_gpu_hours=sum(one.saved_gpu_hours for one in money),
        saved_cost_usd=_sum([one.saved_cost_usd for one in money]),
        graph_saved_gpu_hours=sum(one.graph_saved_gpu_hours for one in money),
        graph_saved_cost_usd=_sum([one.graph_saved_cost_usd for one in money]),
        graph_saved_j=sum(one.graph_saved_j for one in money),
        it_kwh=_sum([one.it_kwh for one in energies]),
        facility_kwh=_sum([one.facility_kwh for one in energies]),
        co2_kg=_sum([one.co2_kg for one in energies]),
        energy_is_estimate=any(one.is_estimate for one in energies),
        jobs_without_energy=len(jobs) - len(energies),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """Add up; None where there is nothing to add or a part is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _weighted(jobs: Sequence[JobReport], values: Sequence[float | None]) -> float | None:
    weight = total = 0.0
    for job, value in zip(jobs, values, strict=True):
        if value is not None:
            share = job.facts.summary.world_size * job.time.elapsed_s
            weight += share
            total += share * value
    return total / weight if weight else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _bytes(number: int) -> str:
    size, units = float(number), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{number} B"
