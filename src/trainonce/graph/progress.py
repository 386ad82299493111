"""What a `compute` shows while it runs, and what a dry run says it would do."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far a `compute` is.

    Args:
        total: Distinct nodes known so far; nodes that return nodes add to it.
        done: Settled ones.
        hits: Of these, found in the store.
        running: Being evaluated now.
        left_s: Seconds that what is left took when it last ran; None where that is not known.
    """

    total: int
    done: int
    hits: int
    running: int
    left_s: float | None = None

    def __str__(self) -> str:
        left = "" if self.left_s is None else f", about {self.left_s:.0f} s left"
        return f"{self.done}/{self.total} nodes, {self.hits} hits, {self.running} running{left}"


class Printer:
    """Shows progress on stderr: one changing line on a terminal, else a line now and then."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._last_s = float("-inf")

    def __call__(self, progress: Progress) -> None:
        """Show `progress`, unless that was done just before."""
        now_s = time.monotonic()
        is_last = progress.done == progress.total
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{progress}" + ("\n" if is_last else ""))
        elif is_last or now_s - self._last_s >= self._every_s:
            sys.stderr.write(f"{progress}\n")
            self._last_s = now_s
        sys.stderr.flush()


@dataclass(frozen=True)
class Step:
    """One node of a dry run.

    Args:
        node: Its name.
        action: "hit", "run", or "unknown" where that depends on inputs which would run.
        key: The action key; empty where it is not known yet, or there is none.
        seconds: What it took last time; None where it never ran.
        reasons: Why it is not cached.
    """

    node: str
    action: str
    key: str = ""
    seconds: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What `compute(..., dry_run=True)` would do, inputs before what needs them."""

    steps: list[Step] = field(default_factory=lambda: [])

    @property
    def seconds(self) -> float:
        """What the nodes that would run, or may, took last time."""
        return sum(step.seconds or 0.0 for step in self.steps if step.action != "hit")

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            took = "" if step.seconds is None else f"  {step.seconds:.2f} s last time"
            why = f"  not cached: {'; '.join(step.reasons)}" if step.reasons else ""
            lines.append(f"{step.action:8}{step.node}  {step.key[:16]}{took}{why}")
        return "\n".join(lines)
