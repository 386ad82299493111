"""The clock, and the fake one that tests advance."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """What time-dependent code asks for, so that tests need not wait."""

    def mono_s(self) -> float:
        """Seconds that only ever grow; comparable between processes of one host."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch, for showing; never subtract them across hosts."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Let `duration_s` seconds pass."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def mono_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def sleep(self, duration_s: float) -> None:
        """Block this thread for `duration_s` seconds."""
        time.sleep(duration_s)


class FakeClock:
    """A clock that stands still until it is told to move.

    Args:
        start_s: What both clocks show at first.
    """

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s
        self._lock = threading.Lock()

    def mono_s(self) -> float:
        """Seconds advanced so far, plus the start."""
        return self._now_s

    def wall_s(self) -> float:
        """The same as `mono_s`."""
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        """Advance by `duration_s` without waiting."""
        self.advance(duration_s)

    def advance(self, duration_s: float) -> None:
        """Let `duration_s` seconds pass at once."""
        if duration_s < 0:
            raise ValueError(f"a clock does not run backwards: {duration_s} s")
        with self._lock:
            self._now_s += duration_s
