"""Calls to be made later, on the launcher's clock."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.clock import Clock


class Timers:
    """Pending calls in the order they are due."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Make `call` once `delay_s` have passed."""
        due = self._clock.mono_s() + delay_s
        heapq.heappush(self._heap, (due, next(self._count), call))

    def wait_s(self, at_most_s: float) -> float:
        """Return how long nothing is due, at most `at_most_s`."""
        if not self._heap:
            return at_most_s
        return min(max(0.0, self._heap[0][0] - self._clock.mono_s()), at_most_s)

    def run_due(self) -> None:
        """Make the calls that are due."""
        while self._heap and self._heap[0][0] <= self._clock.mono_s():
            heapq.heappop(self._heap)[2]()
