"""Whether torch was imported in the environment that the launcher gave.

Variables such as OMP_NUM_THREADS are read at the import. A script that sets some before it
imports torch must not get spares that are forked from a process that imported torch without.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_watch: _Watch | None = None


class _Watch:
    """First on `sys.meta_path`: finds nothing, and sees the import of torch begin."""

    def __init__(self) -> None:
        self._before = dict(os.environ)
        self.unchanged = False

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> None:
        if name == "torch":
            self.unchanged = dict(os.environ) == self._before
            sys.meta_path.remove(self)


def watch() -> None:
    """Begin to watch, before the script runs."""
    global _watch
    if "torch" not in sys.modules:
        _watch = _Watch()
        sys.meta_path.insert(0, _watch)


def torch_saw_environment() -> bool:
    """Tell whether torch was imported after `watch`, and no variable had changed by then."""
    return _watch is not None and _watch.unchanged
