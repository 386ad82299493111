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
_STACKS_SIGNAL = signal.SIGRTMAX - 3
_LATEST = 200


def write_stacks_at_a_signal() -> int:
    """Have the stacks of all threads written to stderr at a signal; return which.

    By signal and not by message: its handler is C, so that a thread that hangs with the
    interpreter's lock in its hands is seen as well.
    """
    faulthandler.register(_STACKS_SIGNAL, file=sys.__stderr__ or 2)
    return _STACKS_SIGNAL


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
