"""What SQLite needs in a process that forks.

A forked child inherits SQLite's locks as other threads held them at the fork, and connections
that their threads were using. It could wait for a lock that nobody gives back; so background
threads of ours are inside SQLite only within `no_fork`, and a child never finalises the
connections of its parent.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Connection(sqlite3.Connection):
    """Use as `sqlite3.connect(..., factory=Connection)`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        _open.add(self)


_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_held: list[Connection] = []
_inside = threading.RLock()


def no_fork() -> AbstractContextManager[object]:
    """Return the lock that a fork waits for: hold it on a background thread inside SQLite."""
    return _inside


def _before() -> None:
    _inside.acquire()
    _held.extend(_open)


def _after_in_parent() -> None:
    _held.clear()
    _inside.release()


def _after_in_child() -> None:
    global _inside
    _inside = threading.RLock()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
