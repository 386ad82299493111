"""What a worker can tell of a hang: where its threads are, and what became of its collectives."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from trainonce.worker.torch_private import recorded_collectives

if TYPE_CHECKING:
    from pathlib import Path

# Near the end of the real-time signals, where schedulers and libraries send none.
_STACK_SIGNAL = signal.SIGRTMAX - 3
_ALL_STACKS_SIGNAL = signal.SIGRTMAX - 4
_LATEST = 200


def write_stacks_at_signals() -> tuple[int, int]:
    """Have stacks written to stderr at two signals: of the main thread, and of all threads.

    By signal and not by message: its handler is C, so that a thread that hangs with the
    interpreter's lock in its hands is seen as well. Reading the stack of a thread that runs
    meanwhile may crash the process, so all are for one that is to be killed anyway.
    """
    file = sys.__stderr__ or 2
    faulthandler.register(_STACK_SIGNAL, file=file, all_threads=False)
    faulthandler.register(_ALL_STACKS_SIGNAL, file=file)
    return _STACK_SIGNAL, _ALL_STACKS_SIGNAL


def write_collectives(path: Path) -> None:
    """Write the latest collectives of every backend that records them; no file where none does.

    Whatever torch or the disk says to that: it is called on the thread that hears the launcher.
    """
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        for backend, record in recorded_collectives().items():
            entries = record.get("entries", [])
            if entries:
                found[backend] = {**record, "entries": entries[-_LATEST:]}
        if found:
            path.write_text(json.dumps(found))
