"""Incidents from their detection until training goes on, and the sentence that tells them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainonce.events import Incident
from trainonce.ledger.words import one_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from trainonce.clock import Clock
    from trainonce.wire.messages import Formed


@dataclass(kw_only=True)
class OpenIncident:
    """An incident that is being served. Times are on the launcher's monotonic clock."""

    number: int
    ranks: list[int]
    pids: list[int]
    cause: str
    detail: str
    detected_by: str
    step: int
    generation: int
    detected_mono_s: float
    served_by: str = "rebuild"
    planned: bool = False
    chaos: bool = False
    detected_s: float = 0.0
    waiting: bool = False
    waited_s: float = 0.0
    announced: bool = False
    recovered_mono_s: float = 0.0
    steps_lost: int = 0
    recomputed: int = 0
    bytes_moved: int = 0
    given: set[str] = field(default_factory=lambda: set())
    taken: set[str] = field(default_factory=lambda: set())
    formed_step: int = 0
    resumes_at: int = 0
    """The pause ends with the first commit beyond that many."""
    commit_times: dict[int, float] = field(default_factory=lambda: {})


class IncidentTracker:
    """Follows open incidents: opened at detection, closed at the next commit after recovery.

    Args:
        clock: The launcher's clock.
        host: Where the workers run.
        closed: Called with each incident when it closes, and with its sentence.
    """

    def __init__(self, clock: Clock, host: str, closed: Callable[[Incident, str], None]) -> None:
        self._clock = clock
        self._host = host
        self._closed = closed
        self.open: list[OpenIncident] = []
        self.total = 0

    @property
    def wants_fine_time(self) -> bool:
        """Whether a commit that ends a pause may come at any moment."""
        return any(incident.announced for incident in self.open)

    def begin(
        self, *, ranks: list[int], pids: list[int], cause: str, detail: str, detected_by: str,
        step: int, generation: int, served_by: str = "rebuild", planned: bool = False,
        chaos: bool = False, last_sign_mono_s: float = 0.0,
    ) -> OpenIncident:  # fmt: skip
        """Open an incident that was detected now."""
        now = self._clock.mono_s()
        self.total += 1
        incident = OpenIncident(
            number=self.total, ranks=ranks, pids=pids, cause=cause, detail=detail,
            detected_by=detected_by, step=step, generation=generation, served_by=served_by,
            planned=planned, chaos=chaos, detected_mono_s=now,
            detected_s=max(0.0, now - last_sign_mono_s) if last_sign_mono_s else 0.0,
        )  # fmt: skip
        self.open.append(incident)
        return incident

    def give_to_guests(self, guests: AbstractSet[int]) -> None:
        """Note which ranks were given to workers that share a device with another rank."""
        for incident in self.open:
            if incident.served_by in ("rebuild", "guest"):
                shares = not guests.isdisjoint(incident.ranks)
                incident.served_by = "guest" if shares else "rebuild"

    def wait_for_spare(self) -> bool:
        """Note that no spare is ready; tell whether that is news for some incident."""
        fresh = [i for i in self.open if not i.waiting and not i.announced]
        for incident in fresh:
            incident.waiting = True
        return bool(fresh)

    def announce(self, served_by: str = "") -> None:
        """Note that a generation was announced, or a restart begun, for all open incidents."""
        now = self._clock.mono_s()
        for incident in self.open:
            if incident.waiting and not incident.announced:
                incident.waited_s = now - incident.detected_mono_s
            incident.announced = True
            incident.recovered_mono_s = 0.0
            incident.commit_times.clear()
            incident.formed_step = 0
            incident.served_by = served_by or incident.served_by

    def note_formed(self, report: Formed, *, rank: int, newcomer: bool) -> None:
        """Take in what a rank said when it joined."""
        for incident in self.open:
            incident.formed_step = max(incident.formed_step, report.step)
            if incident.served_by == "predecessor":
                continue  # nothing had to be moved for it
            incident.bytes_moved += report.bytes_moved
            # A drained rank stood at a commit: its successor begins the step, and repeats none.
            incident.recomputed += 0 if incident.planned else report.recompute
            if report.from_shadow:
                incident.served_by = "shadow"
            if report.digest and newcomer and rank in incident.ranks:
                incident.taken.add(report.digest)
            elif report.digest and not newcomer:
                incident.given.add(report.digest)

    def note_taken_back(self, rank: int) -> None:
        """Note that the worker that was to be moved away goes on with `rank`."""
        for incident in self.open:
            if incident.ranks == [rank] and (incident.planned or not incident.announced):
                incident.served_by = "predecessor"

    def recovered(self, *, restarted_at: int | None = None, from_shadow: bool = False) -> None:
        """Note that all ranks are consistent; after a restart, at which step, and from where."""
        now = self._clock.mono_s()
        served = [i for i in self.open if i.announced and not i.recovered_mono_s]
        for incident in served:
            incident.recovered_mono_s = now
            # A rank that was one commit ahead has told of that one before.
            incident.resumes_at = max(incident.formed_step, incident.step)
        if restarted_at is not None and served:
            lost = max(0, max(incident.step for incident in served) - restarted_at)
            # Shared between those that led to it: their sum is what was lost, once.
            for place, incident in enumerate(reversed(served)):
                incident.formed_step = incident.resumes_at = restarted_at
                incident.commit_times.clear()
                if from_shadow:
                    incident.served_by = "shadow"
                elif restarted_at:  # one may have been completed since the restart began
                    incident.served_by = "checkpoint"
                incident.steps_lost = (lost + len(served) - 1 - place) // len(served)
        self._close_ready()

    def note_step(self, step: int) -> None:
        """Note that `step` steps are committed; closes incidents whose pause this ends."""
        if not self.open:
            return
        now = self._clock.mono_s()
        for incident in self.open:
            if incident.announced:
                incident.commit_times.setdefault(step, now)
        self._close_ready()

    def close_all(self, *, served: bool) -> None:
        """Close what is open when the job ends; `served` tells whether training was finished."""
        now = self._clock.mono_s()
        for incident in self.open:
            if not served and not incident.recovered_mono_s:
                incident.served_by = "none"
            self._finish(incident, now)
        self.open = []

    def _close_ready(self) -> None:
        still: list[OpenIncident] = []
        for incident in self.open:
            later = [t for s, t in incident.commit_times.items() if s > incident.resumes_at]
            if incident.recovered_mono_s and later:
                self._finish(incident, min(later))
            else:
                still.append(incident)
        self.open = still

    def _finish(self, incident: OpenIncident, resumed_mono_s: float) -> None:
        recovered_s = incident.recovered_mono_s or resumed_mono_s
        ago_s = self._clock.mono_s() - incident.detected_mono_s
        event = Incident(
            wall_s=self._clock.wall_s() - ago_s,
            mono_s=incident.detected_mono_s,
            incident=incident.number,
            ranks=incident.ranks,
            cause=incident.cause,
            detail=incident.detail,
            detected_by=incident.detected_by,
            served_by=incident.served_by,
            step=incident.step,
            generation=incident.generation,
            planned=incident.planned,
            chaos=incident.chaos,
            detected_s=incident.detected_s,
            pause_s=max(0.0, resumed_mono_s - incident.detected_mono_s),
            recovery_s=max(0.0, recovered_s - incident.detected_mono_s),
            steps_lost=incident.steps_lost,
            micro_batches_recomputed=incident.recomputed,
            bytes_moved=incident.bytes_moved,
            digest_before=_digests(incident.taken & incident.given or incident.given),
            digest_after=_digests(incident.taken),
            waited_for_spare_s=incident.waited_s,
            host=self._host,
            pids=incident.pids,
        )
        self._closed(event, sentence(event))


def _digests(found: set[str]) -> str:
    """Return one text for the digests of one or several parts of the state."""
    return "+".join(sorted(found))


def sentence(event: Incident) -> str:
    """Return `event` as one sentence."""
    return f"{what_happened(event)}; {_how_served(event)}"


def what_happened(event: Incident | OpenIncident) -> str:
    """Return the first half of the sentence: who, what, when."""
    plural = len(event.ranks) != 1
    who = f"rank{'s' if plural else ''} {' and '.join(map(str, event.ranks))}"
    pids = f"(pid{'s' if plural else ''} {', '.join(map(str, event.pids))})"
    detail = one_line(event.detail)
    what = {
        "signal": f"{who} {pids} died of {detail}",
        "oom": f"{who} {pids} {'were' if plural else 'was'} killed for memory",
        "exit": f"{who} {pids} ended with {detail} before the job was done",
        "exception": f"{who} {pids} raised {detail}",
        "misuse": f"{who} {pids} raised {detail}",
        "recovery": f"{who} {pids} could not be rebuilt: {detail}",
        "hang": f"{who} {pids} hung: {detail}",
        "connection": f"the connection between the ranks broke ({detail})",
        "migration": f"{who} {pids} {_was_moved(event)} {_why_moved(event)}",
    }.get(event.cause, f"{who} {pids}: {event.cause}, {detail}")
    return f"{what} at step {event.step}"


def _was_moved(event: Incident | OpenIncident) -> str:
    return "was to move" if event.served_by == "predecessor" else "moved"


def _why_moved(event: Incident | OpenIncident) -> str:
    if event.detected_by == "health":
        return f"away from a device that will fail ({event.detail})"
    return event.detail if event.detected_by == "request" else f"since {event.detail}"


def _how_served(event: Incident) -> str:
    place = "its place" if len(event.ranks) == 1 else "their places"
    taker = "a spare" if len(event.ranks) == 1 else "spares"
    if event.waited_for_spare_s:
        taker = "a new worker" if len(event.ranks) == 1 else "new workers"
    how = {
        "rebuild": f"{taker} took {place}",
        "migration": f"{taker} took {place}",
        "guest": f"{'a guest' if len(event.ranks) == 1 else 'guests'} on the device of another rank"
        f" took {place}",
        "shadow": "the state came from its shadow",
        "reform": "the same ranks connected again",
        "predecessor": "the process that was to be moved away goes on with the rank",
        "restart": "all ranks were started again from the beginning",
        "checkpoint": "all ranks went on from the last checkpoint",
    }.get(event.served_by, "")
    if not how:
        return "the job ended"
    lost = "no step lost"
    if event.steps_lost:
        lost = f"{event.steps_lost} step{'s' if event.steps_lost != 1 else ''} to compute again"
    return f"{how}: paused {duration(event.pause_s)}, {lost}"


def duration(seconds: float) -> str:
    """Return `seconds` for people: "61 ms", "2.4 s", "3.5 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
