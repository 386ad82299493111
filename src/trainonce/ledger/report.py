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
from trainonce.ledger.totals import Totals, total
from trainonce.ledger.words import sentence

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
            of_all=job is None and project is None and since_wall_s is None,
        ),
        totals=total(jobs),
        by_project={name: total(some) for name, some in sorted(by_project.items())},
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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
