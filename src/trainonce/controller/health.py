"""Acts on health signals: tells of them, and moves ranks away from devices that will fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.controller.slots import names_of
from trainonce.events import HealthChanged
from trainonce.fleet.moves import Move, may_move

if TYPE_CHECKING:
    from trainonce.controller.job import Job
    from trainonce.controller.migration import Migration
    from trainonce.controller.slots import Place
    from trainonce.fleet.feed import Feed, Finding, HealthSettings

# A verdict that comes and goes is told again only after so long.
_TOLD_S = 600.0
# What a source said of a device's use that has fallen silent holds for so long.
_USE_S = 60.0
_ACTIONS = ("none", "note", "suspect", "migrate")
_SUSPECT, _MIGRATE = 2, 3


class Health:
    """Follows what a feed finds, on the launcher's loop.

    Args:
        job: The job.
        migration: Moves ranks.
        feed: Finds out; started and closed here.
        settings: What may follow.
    """

    def __init__(
        self, job: Job, migration: Migration, feed: Feed, settings: HealthSettings
    ) -> None:
        self._job = job
        self._migration = migration
        self._feed = feed
        self._settings = settings
        self._pci: dict[str, str] = {}
        self._use: dict[tuple[str, str], tuple[float, float]] = {}  # share, when
        self._now: dict[tuple[str, str], Finding] = {}
        self._told_s: dict[tuple[str, str, int], float] = {}
        self._moves: list[Move] = []
        self._moving: set[int] = set()
        job.is_unfit = lambda place: self._is_bad(place, _SUSPECT)
        job.slots.closed[self] = lambda place: self._is_bad(place, _MIGRATE)
        job.device_use = self._device_use

    def start(self) -> None:
        """Begin to read."""
        self._feed.start()

    def close(self) -> None:
        """Stop reading."""
        self._feed.close()

    def look(self) -> None:
        """Take in what is new, and act on what stands."""
        news = self._feed.take()
        self._pci = news.pci or self._pci
        now_s = self._job.clock.mono_s()
        self._use |= {place: (share, now_s) for place, share in news.use.items()}
        asked = set(self._settings.sources) - {"auto"}
        for word, why in news.missing.items():
            if any(each.partition(":")[0] == word.partition(":")[0] for each in asked):
                self._job.say(f"note: {why}", once=f"health {word}")
        for finding in news.findings:
            self._now[finding.host, finding.device] = finding
            self._tell(finding)
        for finding in self._now.values():
            if finding.verdict.action == _MIGRATE:
                self._move_away(finding)

    def device_of(self, place: Place) -> str:
        """Return the device in a place, as signals call it; empty where there is none."""
        return self._pci.get(place.device, f"pci:{place.device}" if place.device else "")

    def _names(self, place: Place) -> tuple[str, ...]:
        """Return what signals may call the device in a place."""
        return self.device_of(place), *names_of(place)

    def _holds(self, place: Place, finding: Finding) -> bool:
        if place.host != finding.host or not finding.device:
            return False
        return finding.device in self._names(place)

    def _is_bad(self, place: Place, action: int) -> bool:
        bad = [finding for finding in self._now.values() if finding.verdict.action >= action]
        return any(self._holds(place, finding) for finding in bad)

    def _device_use(self) -> float | None:
        since_s = self._job.clock.mono_s() - max(_USE_S, 2 * self._settings.every_s)
        places = [(h.host, name) for h in self._job.ranked() for name in self._names(h.place)]
        seen = [self._use[place] for place in places if place in self._use]
        known = [share for share, when_s in seen if when_s >= since_s]
        return sum(known) / len(known) if known else None

    def _tell(self, finding: Finding) -> None:
        job = self._job
        action = int(finding.verdict.action)
        key, now_s = (finding.host, finding.device, action), job.clock.mono_s()
        if now_s - self._told_s.get(key, float("-inf")) < _TOLD_S:
            return
        self._told_s[key] = now_s
        ranks = [h.rank for h in job.ranked() if self._holds(h.place, finding)]
        job.record(
            HealthChanged(
                host=finding.host, device=finding.device, action=_ACTIONS[action],
                reasons=list(finding.verdict.reasons), ranks=ranks,
            )
        )  # fmt: skip
        if action >= _SUSPECT:
            holds = f" (rank {', '.join(map(str, ranks))})" if ranks else ""
            name = finding.device or "the host"
            job.say(f"{name} of {finding.host}{holds}: {finding.verdict.reasons[0]}")

    def _move_away(self, finding: Finding) -> None:
        job = self._job
        # A host as a whole cannot be left by a launcher of one host: that is for `trainonce drain`.
        for handle in job.ranked():
            if not self._holds(handle.place, finding) or handle.rank in self._moving:
                continue
            who = f"rank {handle.rank} stays on {finding.device}"
            if not self._settings.move:
                job.say(f"{who}: moving is switched off", once=f"stays {handle.worker}")
                continue
            decision = may_move(
                f"{finding.host}/{finding.device}",
                now_s=job.clock.mono_s(),
                spares_ready=sum(s.fit and bool(s.where) for s in job.spare_statuses()),
                moves=self._moves,
                limits=self._settings,
            )
            if not decision.allowed:
                job.say(
                    f"{who}: {decision.reason}", once=f"stays {handle.worker} {decision.reason}"
                )
                continue
            self._move(handle.rank, finding)

    def _move(self, rank: int, finding: Finding) -> None:
        self._moving.add(rank)

        def answer(_ok: bool, _text: str) -> None:
            self._moving.discard(rank)

        accepted = self._migration.request(
            rank, answer, detail=finding.verdict.reasons[0], detected_by="health"
        )
        if accepted:
            self._moves.append(Move(f"{finding.host}/{finding.device}", self._job.clock.mono_s()))
