"""Reading events and jobs back from an open ledger."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import LedgerError
from trainonce.events import Event, JobEnded, JobStarted, from_record
from trainonce.ledger.identity import Writer, is_alive

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

# A launcher on another host is believed to be gone when nothing was heard for this long;
# it reports progress every few seconds.
SILENT_S = 900.0
# Budgets are checked by others than the launcher, also after a job: no sign of its life.
_HEARD = "CASE kind WHEN 'budget_crossed' THEN NULL ELSE wall_s END"


@dataclass(frozen=True, kw_only=True)
class JobSummary:
    """One job in a line.

    Args:
        job: Its id.
        project: Its project tag.
        script: What ran.
        host: Where its launcher ran.
        world_size: Ranks.
        spares: Spares asked for.
        started_wall_s: When it began.
        ended_wall_s: When it ended; None while it runs. For a lost job: the last word of it.
        outcome: "running", "completed", "failed", "interrupted" or "lost".
        exit_code: The launcher's; None where it never gave one.
        reason: Why it ended so.
        steps: Committed steps, as last reported.
        num_incidents: Failures, moves and false alarms.
        num_events: All events.
    """

    job: str
    project: str
    script: str
    host: str
    world_size: int
    spares: int
    started_wall_s: float
    ended_wall_s: float | None
    outcome: str
    exit_code: int | None
    reason: str
    steps: int
    num_incidents: int
    num_events: int


class Unknown:
    """Counts rows that this version cannot read."""

    def __init__(self) -> None:
        self.count = 0


class View:
    """An open ledger, for several questions in a row. Made by `Ledger.reading`."""

    def __init__(self, connection: sqlite3.Connection, unknown: Unknown) -> None:
        self._connection = connection
        self._unknown = unknown

    def jobs(self) -> list[JobSummary]:
        """Return one summary a job, newest first."""
        return read_jobs(self._connection, self._unknown)

    def events(self, job: str, kind: str | None = None) -> Iterator[Event]:
        """Yield the events of `job` in order, all or of one kind."""
        return read_events(self._connection, job, kind, self._unknown)


def parse(record: str, unknown: Unknown) -> Event | None:
    """Return the event in `record`, or None and count it where this version cannot read it.

    Fields that a newer version added to a known kind are passed over.
    """
    try:
        values: dict[str, Any] = json.loads(record)
        kind = str(values.get("kind"))
        cls = _classes().get(kind)
        if cls is not None:
            known = {field.name for field in dataclasses.fields(cls)}
            values = {name: value for name, value in values.items() if name in known}
            values["kind"] = kind
        return from_record(values)
    except (LedgerError, ValueError, AttributeError):
        unknown.count += 1
        return None


def read_events(
    connection: sqlite3.Connection, job: str, kind: str | None, unknown: Unknown
) -> Iterator[Event]:
    """Yield the events of `job` in the order in which they were appended."""
    query = "SELECT record FROM events WHERE job = ?"
    values = [job]
    if kind is not None:
        query += " AND kind = ?"
        values.append(kind)
    for (record,) in connection.execute(f"{query} ORDER BY seq", values):
        event = parse(record, unknown)
        if event is not None:
            yield event


def read_jobs(connection: sqlite3.Connection, unknown: Unknown) -> list[JobSummary]:
    """Return one summary a job, newest first."""
    counts = connection.execute(
        f"SELECT job, count(*), sum(kind = 'incident'), max({_HEARD}), min(wall_s) "
        "FROM events GROUP BY job"
    ).fetchall()
    found = [_summary(connection, unknown, *row) for row in counts]
    return sorted(found, key=lambda one: (one.started_wall_s, one.job), reverse=True)


def _summary(
    connection: sqlite3.Connection,
    unknown: Unknown,
    job: str,
    num_events: int,
    num_incidents: int,
    last_wall_s: float | None,
    first_wall_s: float,
) -> JobSummary:
    started = _last(connection, job, JobStarted.kind, unknown)
    ended = _last(connection, job, JobEnded.kind, unknown)
    progress = _last(connection, job, "progress", unknown)
    steps = int(getattr(progress, "step", 0))
    if isinstance(ended, JobEnded):
        outcome, exit_code, reason = ended.outcome, ended.exit_code, ended.reason
        steps, ended_wall_s = ended.steps, ended.wall_s
    elif _is_running(connection, job, last_wall_s or first_wall_s):
        outcome, exit_code, reason, ended_wall_s = "running", None, "", None
    else:
        outcome, exit_code, ended_wall_s = "lost", None, last_wall_s or first_wall_s
        reason = "the launcher ended without a word"
    start = started if isinstance(started, JobStarted) else None
    return JobSummary(
        job=job,
        project=start.project if start else "default",
        script=start.script if start else "?",
        host=start.host if start else "?",
        world_size=start.world_size if start else 0,
        spares=start.spares if start else 0,
        started_wall_s=start.wall_s if start else first_wall_s,
        ended_wall_s=ended_wall_s,
        outcome=outcome,
        exit_code=exit_code,
        reason=reason,
        steps=steps,
        num_incidents=num_incidents,
        num_events=num_events,
    )


def _last(connection: sqlite3.Connection, job: str, kind: str, unknown: Unknown) -> Event | None:
    row = connection.execute(
        "SELECT record FROM events WHERE job = ? AND kind = ? ORDER BY seq DESC LIMIT 1",
        (job, kind),
    ).fetchone()
    return parse(row[0], unknown) if row else None


def _is_running(connection: sqlite3.Connection, job: str, last_wall_s: float) -> bool:
    """Tell whether a process that wrote about `job` lives, as far as can be known."""
    rows = connection.execute(
        "SELECT * FROM writers WHERE writer IN "
        f"(SELECT DISTINCT writer FROM events WHERE job = ? AND {_HEARD} IS NOT NULL)",
        (job,),
    ).fetchall()
    names = ("writer", "host", "machine", "pid", "started")
    alive = [is_alive(Writer(**dict(zip(names, row, strict=True)))) for row in rows]
    if any(alive):
        return True
    return None in alive and time.time() - last_wall_s < SILENT_S


def _classes() -> dict[str, type[Event]]:
    return {cls.kind: cls for cls in Event.__subclasses__()}
