"""The launcher's order to stop at the next commit, so that the rank can move."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_NONE = 0


class DrainOrder:
    """At most one, given in a generation and void with the next: then the worker goes on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._generation = _NONE

    def give(self, generation: int) -> None:
        """Stop at the next commit; a worker that stands still goes on standing."""
        self._set(generation)

    def withdraw(self) -> None:
        """Go on, from wherever this worker stands."""
        self._set(_NONE)

    def heed(self, tell: Callable[[int], object]) -> bool:
        """Stand still at a commit while there is an order.

        Args:
            tell: Called with the generation of each order that is followed.

        Returns:
            Whether there was one.
        """
        stood = False
        while (generation := self._generation) != _NONE:
            stood = True
            tell(generation)
            with self._changed:
                while self._generation == generation:
                    self._changed.wait()
        return stood

    def _set(self, generation: int) -> None:
        with self._changed:
            self._generation = generation
            self._changed.notify_all()
