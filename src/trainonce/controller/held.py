"""Descriptors of shared memory that the launcher holds for the ranks."""

from __future__ import annotations

import contextlib
import os


class Held:
    """At most one descriptor a rank; all are owned."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._fds)

    def keep(self, rank: int, fd: int) -> None:
        """Hold `fd` for `rank`, in place of the one before."""
        if (old := self._fds.pop(rank, None)) is not None:
            os.close(old)
        self._fds[rank] = fd

    def of(self, rank: int) -> tuple[int, ...]:
        """Return the descriptor of `rank`, or nothing."""
        return (self._fds[rank],) if rank in self._fds else ()

    def drop(self) -> None:
        """Let go of all."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()
