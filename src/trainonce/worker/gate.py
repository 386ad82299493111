"""Keeps updates and donations of protected state apart."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainonce.worker.host import Superseded

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_POLL_S = 0.02


class UpdateGate:
    """Held by the training thread from the first change of protected state to the commit.

    A recovery that finds it held lets the update finish; an update that finds it held waits
    for the recovery.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._updating = False

    @property
    def updating(self) -> bool:
        """Whether the training thread holds the gate."""
        return self._updating

    def begin_update(self) -> None:
        """Training thread: hold the gate; nothing happens if it is held already."""
        if not self._updating:
            self._lock.acquire()
            self._updating = True

    def end_update(self) -> None:
        """Training thread: let go; nothing happens if it is not held."""
        if self._updating:
            self._updating = False
            self._lock.release()

    @contextmanager
    def frozen(self, superseded: Callable[[], bool]) -> Generator[None]:
        """Recovery thread: hold updates back.

        Raises:
            Superseded: A newer generation was announced while waiting.
        """
        while not self._lock.acquire(timeout=_POLL_S):
            if superseded():
                raise Superseded
        try:
            yield
        finally:
            self._lock.release()
