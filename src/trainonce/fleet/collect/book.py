"""What the collector knows: the last report of each host, and whom it believes."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainonce.errors import TrainOnceError
from trainonce.fleet.collect.message import decode

if TYPE_CHECKING:
    from trainonce.clock import Clock
    from trainonce.fleet.collect.message import HostReport

REASONS = ("token", "size", "content", "impostor", "rate", "full", "request")


class RefusedError(TrainOnceError):
    """A report that is not taken; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (RefusedError, (self.reason, self.message))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The last report of a host."""

    report: HostReport
    address: str
    heard_mono_s: float
    heard_wall_s: float
    is_fresh: bool = True


class Book:
    """Keeps one report a host. Thread-safe, and bounded in every dimension.

    A host's name belongs to the address that it was first heard from, for as long as that goes on
    reporting: with one token for all, an agent that lies can only lie about its own host.

    Args:
        clock: Tells how old reports are.
        stale_s: A host that was not heard of for so long is down.
        forget_s: And is forgotten after so long.
        min_gap_s: Reports of one host that come faster are refused.
        max_hosts: Hosts that are kept.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        stale_s: float = 60.0,
        forget_s: float = 86_400.0,
        min_gap_s: float = 0.2,
        max_hosts: int = 4096,
    ) -> None:
        self._clock = clock
        self._stale_s = stale_s
        self._forget_s = forget_s
        self._min_gap_s = min_gap_s
        self._max_hosts = max_hosts
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self.num_taken = 0
        self.rejected: Counter[str] = Counter(dict.fromkeys(REASONS, 0))

    def take(self, data: bytes, address: str) -> HostReport:
        """Keep the report in `data`.

        Args:
            data: As it came.
            address: From where.

        Raises:
            RefusedError: It is not taken.
        """
        try:
            report = decode(data)
        except TrainOnceError as error:
            raise RefusedError("content", error.message) from error
        now_s = self._clock.mono_s()
        with self._lock:
            before = self._entries.get(report.host)
            if before is not None:
                age_s = now_s - before.heard_mono_s
                if before.address != address and age_s < self._stale_s:
                    raise RefusedError(
                        "impostor", f"{report.host} reports from {before.address} already"
                    )
                if age_s < self._min_gap_s:
                    raise RefusedError("rate", f"{report.host} reports too often")
            elif len(self._entries) >= self._max_hosts:
                self._forget(now_s)
                if len(self._entries) >= self._max_hosts:
                    raise RefusedError("full", f"{self._max_hosts} hosts are known already")
            self._entries[report.host] = Entry(
                report=report,
                address=address,
                heard_mono_s=now_s,
                heard_wall_s=self._clock.wall_s(),
            )
            self.num_taken += 1
        return report

    def refuse(self, reason: str) -> None:
        """Count a request that was refused."""
        with self._lock:
            self.rejected[reason] += 1

    def entries(self) -> list[Entry]:
        """Return every host, by name."""
        now_s = self._clock.mono_s()
        with self._lock:
            self._forget(now_s)
            return [
                replace(entry, is_fresh=now_s - entry.heard_mono_s < self._stale_s)
                for _, entry in sorted(self._entries.items())
            ]

    def _forget(self, now_s: float) -> None:
        old = [h for h, e in self._entries.items() if now_s - e.heard_mono_s > self._forget_s]
        for host in old:
            del self._entries[host]
