"""The loops of a script, which a newcomer enters where the last commit left them."""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from trainonce.worker.counters import advance, counters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from trainonce.worker.cursor import Cursor, Loop
    from trainonce.worker.data import StatefulLoader
    from trainonce.worker.loader import ShardedLoader
    from trainonce.worker.sources import SourceKey

    Source = ShardedLoader | StatefulLoader


class Loops:
    """Runs `run.epochs` and `run.batches`.

    Attributes:
        waited_ns: How long batches were waited for in all, up to the last commit.
        current_epoch: The epoch of the last loop over batches.

    Args:
        cursor: The open loops.
        enter: Called before a loop begins; a hot spare waits here for a rank.
        fault_point: Lets the fault plan act.
        inside_step: Returns the number of committed steps while a step is executed, else
            None. Loops inside a step belong to it: they begin at their beginning.
        begin: Called before each iteration.
        cannot_count: Told when a script counts batches with an `enumerate` that cannot be set.
    """

    def __init__(
        self,
        cursor: Cursor,
        *,
        enter: Callable[[], None],
        fault_point: Callable[[str], None],
        inside_step: Callable[[], int | None],
        cannot_count: Callable[[], object],
        begin: Callable[[FrameType], object],
    ) -> None:
        self._cursor = cursor
        self._enter = enter
        self._fault_point = fault_point
        self._inside_step = inside_step
        self._cannot_count = cannot_count
        self._begin = begin
        self._epoch: int | None = None
        self._passes: dict[SourceKey, int] = {}
        self._restored_passes: dict[SourceKey, int] = {}
        self._restored: dict[int, _Place] = {}
        self._samples = 0
        self._waited_ns = 0
        self.waited_ns = 0
        self.current_epoch = 0

    def record(self) -> dict[str, Any]:
        """Return where the open batch loops stand, and where the completed ones ended."""
        return {
            "open": [[depth, *place] for depth, place in self._cursor.open_loops()],
            "done": [
                [place, last, None if kept is None else list(kept)]
                for place, (last, kept) in self._cursor.done.items()
            ],
            "passes": dict(self._passes),
        }

    def restore(self, record: dict[str, Any]) -> None:
        """Take over where the loops of the last commit stood."""
        self._restored = {depth: _Place(*place) for depth, *place in record["open"]}
        self._cursor.done = {
            place: (last, None if kept is None else _Place(*kept))
            for place, last, kept in record["done"]
        }
        self._restored_passes = record["passes"]

    def return_to_commit(self) -> None:
        """Count passes over loaders as of the last commit: not all were gone through here."""
        self._passes = dict(self._restored_passes)

    def take_samples(self) -> int:
        """Return the samples of the current batches that were not taken yet, all ranks."""
        samples, self._samples = self._samples, 0
        return samples

    def take_waited_ns(self) -> int:
        """Return how long batches were waited for since the last call."""
        waited_ns, self._waited_ns = self._waited_ns, 0
        self.waited_ns += waited_ns
        return waited_ns

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Yield the epochs that are not completed; of a loop that is, the last."""
        if self._inside_step() is not None:
            yield from range(num_epochs)
            return
        self._enter()
        loop = self._cursor.enter_loop()
        begin = num_epochs if loop.begin is None else loop.begin
        try:
            for epoch in range(begin, begin + 1 if loop.is_done else num_epochs):
                self._cursor.next_iteration(loop, epoch)
                self._epoch = epoch
                self._begin(sys._getframe())
                yield epoch
        finally:
            self._epoch = None
            self._cursor.leave_loop(loop)

    def batches(self, source: Source, key: SourceKey, max_steps: int | None) -> Iterator[Any]:
        """Yield the batches that are not consumed; begins again at the end if it must.

        Args:
            source: Where they come from.
            key: Names the source on all ranks.
            max_steps: Stop after so many.
        """
        me: list[weakref.ref[Iterator[Any]]] = []
        batches = self._batches(source, key, max_steps, me)
        me.append(weakref.ref(batches))
        return batches

    def _count_on(self, batches: Iterator[Any] | None, skipped: int) -> None:
        """Where a script counts batches with `enumerate`, count those that are left out."""
        for counter in counters_of(batches) if skipped and batches is not None else ():
            if not advance(counter, skipped):
                self._cannot_count()

    def _batches(
        self,
        source: Source,
        key: SourceKey,
        max_steps: int | None,
        me: list[weakref.ref[Iterator[Any]]],
    ) -> Iterator[Any]:
        commits = self._inside_step()
        if commits is not None:
            # The epoch is derived, since whoever executes the step must see the same order.
            for batch, _ in itertools.islice(source.iterate(commits), max_steps):
                yield batch
            return
        self._enter()
        loop = self._cursor.enter_loop()
        self._count_on(me[0](), loop.begin or 0)
        passes = self._passes.get(key, 0)
        self._passes[key] = passes + 1
        try:
            if loop.begin is None or (loop.is_done and loop.kept is None):
                return
            if loop.is_done:
                max_steps, restored = loop.begin + 1, loop.kept
            else:
                restored = self._restored.pop(self._cursor.depth_of(loop), None)
            epoch = passes if self._epoch is None else self._epoch
            yield from self._from(source, loop, epoch, max_steps, restored)
        finally:
            if loop.kept is not None and loop.kept.loader is not None:
                loop.kept = None  # a loader of the user's own cannot be put back and forth
            self._cursor.leave_loop(loop)

    def _from(
        self,
        source: Source,
        loop: Loop,
        epoch: int,
        max_steps: int | None,
        restored: _Place | None,
    ) -> Iterator[Any]:
        iteration, offset = loop.begin or 0, 0
        if restored is not None:
            # This batch comes once more, for the code after its step.
            epoch, offset = restored.epoch, restored.offset
            if restored.loader is not None:
                source.load_local_state(restored.loader)  # type: ignore[union-attr]
        while max_steps is None or iteration < max_steps:
            begun = iteration
            batches = source.iterate(epoch, offset)
            self.current_epoch = epoch
            try:
                while max_steps is None or iteration < max_steps:
                    if restored is None:
                        self._fault_point("loader")
                    state = _state_of(source)
                    asked_ns = time.monotonic_ns()
                    item = next(batches, None)
                    self._waited_ns += time.monotonic_ns() - asked_ns
                    if item is None:
                        break
                    batch, after = item
                    if restored is None:
                        self._samples += after - offset
                    elif after != restored.after:
                        # Another number of ranks: the next batch begins where that one ended.
                        after = restored.after
                        _close(batches)
                        batches = source.iterate(epoch, after)
                    restored = None
                    self._cursor.next_iteration(loop, iteration)
                    loop.kept = _Place(epoch, offset, after, state)
                    offset = after
                    self._begin(sys._getframe())
                    yield batch
                    iteration += 1
            finally:
                _close(batches)
            if max_steps is None or iteration == begun:
                return
            epoch, offset = epoch + 1, 0


class _Place(NamedTuple):
    """Where an open loop over batches stands."""

    epoch: int
    offset: int
    """Where the current batch begins."""
    after: int
    """Where the next one begins."""
    loader: Any
    """State of a loader of the user's own, from before the current batch."""


def _state_of(source: Source) -> Any:
    take = getattr(source, "local_state", None)
    return None if take is None else take()


def _close(iterator: Any) -> None:
    iterator.close()
