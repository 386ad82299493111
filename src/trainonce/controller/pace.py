"""Finds slow ranks while a job runs, from what each spends before its collectives."""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING, Any

from trainonce.events import StragglerFound

if TYPE_CHECKING:
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.fleet.stragglers import Straggler, StragglerDetector

# What a slow rank costs has to be seen in the length of a step, too: where ranks wait for each
# other most of the time, a large share of little is nothing.
_MIN_OF_STEP = 0.02
_LEAST_RANKS = 3


class Pace:
    """Feeds the detector with rows of the progress pages, one for each look that shows new steps.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._detector: StragglerDetector | None = None
        self._workers: tuple[int, ...] = ()
        self._step = -1
        self._rows: deque[list[tuple[float, float, float]]] = deque()
        self._told: set[int] = set()

    def look(self, pages: list[tuple[WorkerHandle, dict[str, int]]]) -> None:
        """Take in where the ranks stand; tell of those that are found to be slow."""
        job = self._job
        if job.options.nproc < _LEAST_RANKS or len(pages) != job.options.nproc:
            return
        if not job.membership.is_formed or job.guests():
            return  # who shares a device is slow, and is known to be
        step = min(page["commits"] for _, page in pages)
        if step <= self._step:
            return
        self._step = step
        detector = self._follow_membership()
        row = [
            (page["busy_ns"] / 1e9, page["loader_ns"] / 1e9, page["step_ns"] / 1e9)
            for _, page in pages
        ]
        self._rows.append(row)
        while len(self._rows) > detector.settings.window:
            self._rows.popleft()
        found = detector.observe(step, [busy_s + loader_s for busy_s, loader_s, _ in row])
        for one in found:
            self._tell(one, pages[one.rank][0])

    def _follow_membership(self) -> StragglerDetector:
        # Here, and not above: the launcher should not wait for numpy to load.
        from trainonce.fleet.stragglers import StragglerDetector

        workers = tuple(self._job.membership.workers)
        if self._detector is None:
            self._detector = StragglerDetector(len(workers))
        for rank, (old, new) in enumerate(zip(self._workers, workers, strict=False)):
            if old != new:
                self._detector.forget(rank)
                self._rows.clear()
        self._workers = workers
        return self._detector

    def _tell(self, found: Straggler, handle: WorkerHandle) -> None:
        if handle.worker in self._told or len(self._rows) < 3:
            return
        usual = [self._usual(rank) for rank in range(self._job.options.nproc)]
        busy, loader, step_s = ([each[place] for each in usual] for place in range(3))
        both = [one + other for one, other in zip(busy, loader, strict=True)]
        excess_s = both[found.rank] - statistics.median(both)
        length_s = statistics.median(step_s) + statistics.median(loader)
        if excess_s < _MIN_OF_STEP * length_s:
            return
        self._told.add(handle.worker)
        waited_s = loader[found.rank] - statistics.median(loader)
        cause = "loading" if waited_s > excess_s / 2 else "computing"
        event = StragglerFound(
            rank=found.rank, host=handle.host, step=found.step, slower=found.slower,
            excess_s=excess_s, cause=cause, reason=found.reason,
        )  # fmt: skip
        self._job.record(event)
        self._job.say(
            f"{found.reason}: {excess_s * 1000:.0f} ms of each step, while {cause}; all other ranks"
            f" wait for it. `trainonce migrate {self._job.id} --rank {found.rank}` moves it"
        )

    def _usual(self, rank: int) -> tuple[Any, ...]:
        rows = [row[rank] for row in self._rows]
        return tuple(statistics.median(row[place] for row in rows) for place in range(3))
