"""What the launcher reads of this worker's steps, on a page that they share."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any

import torch

from trainonce.wire.progress import Phase
from trainonce.worker.values import LazyMean

if TYPE_CHECKING:
    from trainonce.wire.progress import Progress
    from trainonce.worker.loops import Loops
    from trainonce.worker.step import Execution

_NAN_BITS = struct.unpack("<q", struct.pack("<d", float("nan")))[0]


class Telemetry:
    """Writes where the training thread is, and what committed steps took.

    Args:
        page: Shared with the launcher.
        loops: Count samples, and what batches were waited for.
    """

    def __init__(self, page: Progress, loops: Loops) -> None:
        self._page = page
        self._loops = loops
        self._tokens = 0
        self._flops = 0
        self._waiting_since_ns = 0
        self.waited_ns = 0
        """What the training thread has waited in collectives so far."""

    def enter(self, phase: Phase) -> None:
        """Say that `phase` begins."""
        self._page["phase"] = phase
        self._page["changed_mono_ns"] = time.monotonic_ns()

    def wait(self, *, begins: bool, inside: Phase) -> None:
        """Say that waiting in a collective begins or has ended; `inside` is the phase around it."""
        now = time.monotonic_ns()
        if begins:
            self._waiting_since_ns = now
        else:
            self.waited_ns += now - self._waiting_since_ns
        self.enter(Phase.WAITING if begins else inside)

    def begin_step(self, execution: Execution) -> None:
        """Say that a step is executed from now on."""
        execution.waited_before_ns = self.waited_ns
        self._page["section_mono_ns"] = execution.begun_mono_ns
        self._page["section"] += 1
        self.enter(Phase.COMPUTING)

    def note_busy(self, execution: Execution) -> None:
        """Take the time until here, less what was waited for others, as that of the step's work."""
        spent_ns = time.monotonic_ns() - execution.begun_mono_ns
        execution.busy_ns = spent_ns - (self.waited_ns - execution.waited_before_ns)

    def count(self, tokens: int, flops: int, peak_flops: int | None) -> None:
        """Add to what the open step has processed."""
        self._tokens += tokens
        self._flops += flops
        if peak_flops is not None:
            self._page["peak_flops"] = peak_flops

    def end_step(self, execution: Execution, value: Any, commits: int) -> None:
        """Say that a step is committed, as the `commits`-th, and returned `value`."""
        page = self._page
        page["samples"] += self._loops.take_samples()
        page["tokens"] += self._tokens
        page["flops"] = self._flops
        self._tokens = self._flops = 0
        page["step_ns"] = time.monotonic_ns() - execution.begun_mono_ns
        page["busy_ns"] = execution.busy_ns or page["step_ns"]
        page["loader_ns"] = self._loops.take_waited_ns()
        page["loss_bits"] = _scalar_bits(value)
        page["commits"] = commits
        self.leave_step()

    def leave_step(self) -> None:
        """Say that the script goes on after a step."""
        self._page["section_mono_ns"] = 0
        self.enter(Phase.BETWEEN)


def _scalar_bits(value: Any) -> int:
    """Return a recorded number as float64 bits, without waiting for a device."""
    if isinstance(value, LazyMean):
        number = value.local
    elif isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        number = float(value)
    elif isinstance(value, float):
        number = value
    else:
        return _NAN_BITS
    return struct.unpack("<q", struct.pack("<d", number))[0]
