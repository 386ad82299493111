"""SQLite connections that a forked child leaves alone.

A child inherits the connections of its parent, and their locks as other threads held them at
the fork: were the garbage collector to finalise one there, it could wait for ever.
"""

from __future__ import annotations

import os
import sqlite3
import weakref


class Connection(sqlite3.Connection):
    """Use as `sqlite3.connect(..., factory=Connection)`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        _open.add(self)


_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_held: list[Connection] = []


def _hold() -> None:
    _held.extend(_open)


os.register_at_fork(before=_hold, after_in_parent=_held.clear)
