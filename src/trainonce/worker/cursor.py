"""Where the script stands, so that a newcomer enters it after the last commit.

A position names one section call by its way through the program: for each loop that is open,
which loop it is within its parent and which iteration it is in, and last, which section call
it is within the innermost iteration. `(0, 3, 0, 17, 0)` is the first section call in iteration
17 of the first loop in iteration 3 of the first loop of the script. Positions compare as
tuples in program order, so "already committed" is `position <= committed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Position = tuple[int, ...]


@dataclass
class _Loop:
    ordinal: int
    iteration: int = -1
    units: int = 0
    """Loops and sections met so far in the current iteration."""


@dataclass
class Cursor:
    """The open loops of a script, and the position of the last commit.

    Args:
        committed: Position of the last committed section; None if there is none.
    """

    committed: Position | None = None
    _stack: list[_Loop] = field(default_factory=lambda: [_Loop(0)])

    def prefix(self) -> Position:
        """Return the position of the innermost open iteration."""
        return tuple(part for loop in self._stack[1:] for part in (loop.ordinal, loop.iteration))

    def enter_section(self) -> Position:
        """Return the position of a section call that begins now."""
        return (*self.prefix(), self._next_unit())

    def is_committed(self, position: Position) -> bool:
        """Tell whether the section call at `position` is already committed."""
        return self.committed is not None and position <= self.committed

    def enter_loop(self) -> tuple[int, int | None]:
        """Open a loop.

        Returns:
            Its depth, a handle for `next_iteration` and `leave_loop`; and the iteration to
            begin at, which holds the last commit if that lies in this loop. None means that
            the whole loop is committed.
        """
        place = (*self.prefix(), self._next_unit())
        self._stack.append(_Loop(place[-1]))
        depth = len(self._stack) - 1
        if self.committed is None:
            return depth, 0
        head = self.committed[: len(place)]
        if head == place and len(self.committed) > len(place):
            return depth, self.committed[len(place)]
        return depth, (0 if place > head else None)

    def next_iteration(self, depth: int, iteration: int) -> None:
        """Begin `iteration` of the loop at `depth`; loops left open inside it are closed."""
        del self._stack[depth + 1 :]
        loop = self._stack[depth]
        loop.iteration = iteration
        loop.units = 0

    def leave_loop(self, depth: int) -> None:
        """Close the loop at `depth` and everything inside it."""
        del self._stack[depth:]

    def is_live(self, position: Position) -> bool:
        """Tell whether `position` lies in an iteration that holds the last commit.

        Values of such sections may be asked for again by a newcomer.
        """
        return self.committed is not None and position[:-1] == self.committed[: len(position) - 1]

    def _next_unit(self) -> int:
        loop = self._stack[-1]
        loop.units += 1
        return loop.units - 1
