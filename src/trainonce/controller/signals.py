"""The signals that end a job, as something a selector can wait for."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable


@contextlib.contextmanager
def caught(signums: Iterable[int]) -> Generator[socket.socket | None]:
    """Catch `signums` until the context is left, and give them back as they were.

    Yields:
        What becomes readable at a signal: a byte each, its number. None outside of the main
        thread, which alone can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {signum: signal.signal(signum, lambda *_: None) for signum in signums}
    wakeup = signal.set_wakeup_fd(theirs.fileno())
    try:
        yield ours
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        theirs.close()
        ours.close()
