"""What the user sees while a job runs: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import shutil
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from trainonce.clock import Clock

_WINDOW_S = 10.0
_PLAIN_EVERY_S = 5.0
_LIVE_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a job at one moment. Samples, tokens and operations count all ranks."""

    step: int
    samples: int = 0
    tokens: int = 0
    flops_per_step: int = 0
    peak_flops: int = 0
    loader_s: float = 0.0
    ranks_alive: int
    world_size: int
    spares_ready: int
    spares: int
    incidents: int
    guests: int = 0
    short: int = 0
    loss: float | None = None
    phase: str = ""


class LiveView:
    """Shows progress and incidents.

    On a terminal the last row is reserved for one live line, and everything else, the
    workers' output included, scrolls above it. Elsewhere a plain line is written every few
    seconds, and only when something changed.

    Args:
        stream: Where to write; stderr, so that data on stdout stays clean.
        clock: Measures rates.
    """

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        self._stream = stream
        self._clock = clock
        self._history: deque[tuple[float, Snapshot]] = deque()
        self._drawn_s = float("-inf")
        self._shown = ""
        self._live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._rows = 0

    def say(self, text: str) -> None:
        """Show one line, or several."""
        for line in text.splitlines():
            self._write(f"trainonce: {line}\n")

    def show(self, snapshot: Snapshot) -> None:
        """Take in where the job stands, and show it if it is time."""
        now = self._clock.mono_s()
        if self._history and snapshot.step < self._history[-1][1].step:
            self._history.clear()  # started again from a checkpoint
        self._history.append((now, snapshot))
        while len(self._history) > 2 and now - self._history[0][0] > _WINDOW_S:
            self._history.popleft()
        if now - self._drawn_s < (_LIVE_EVERY_S if self._live else _PLAIN_EVERY_S):
            return
        self._drawn_s = now
        text = self.line()
        if self._live:
            self._draw(text)
        elif snapshot.step and text != self._shown:
            self.say(text)
        self._shown = text

    def line(self) -> str:
        """Return the progress line for what was shown last."""
        (start_s, first), (end_s, last) = self._history[0], self._history[-1]
        span_s = end_s - start_s
        parts = [f"step {last.step}"]
        if last.phase and not last.step:
            parts = [last.phase]
        if span_s > 0 and last.step > first.step:
            rate = (last.step - first.step) / span_s
            parts.append(f"{rate:.3g} steps/s")
            if last.samples > first.samples:
                parts.append(f"{_count((last.samples - first.samples) / span_s)} samples/s")
            if last.tokens > first.tokens:
                parts.append(f"{_count((last.tokens - first.tokens) / span_s)} tokens/s")
            if last.flops_per_step:
                parts.append(f"{_count(last.flops_per_step * rate)}FLOP/s")
                if last.peak_flops:
                    parts.append(f"MFU {last.flops_per_step * rate / last.peak_flops:.1%}")
        if last.loss is not None:
            parts.append(f"loss {last.loss:.4g}")
        parts.append(f"{last.ranks_alive}/{last.world_size} ranks")
        if last.spares:
            parts.append(f"{last.spares_ready}/{last.spares} spares ready")
        if last.short:
            parts.append("waiting for a device")
        elif last.guests:
            parts.append(f"{last.guests} on another's device")
        if last.incidents:
            parts.append(f"{last.incidents} incident{'s' if last.incidents != 1 else ''}")
        return " · ".join(parts)

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self._rows:
            self._write(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8")
            self._rows = 0

    def _draw(self, text: str) -> None:
        columns, rows = shutil.get_terminal_size()
        if rows < 3:
            return
        if rows != self._rows:
            # Scroll once so that the cursor is not on the row to be reserved; then let only
            # the rows above it scroll. Setting the region moves the cursor: save it.
            self._write(f"\n\x1b7\x1b[1;{rows - 1}r\x1b8\x1b[1A")
            self._rows = rows
        self._write(f"\x1b7\x1b[{rows};1H\x1b[2K{text[: columns - 1]}\x1b8")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The terminal is gone. Training goes on without an audience.
            self._live = False


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g}{' ' + unit if unit else ''}"
        value /= 1000
    return f"{value:.3g} E"
