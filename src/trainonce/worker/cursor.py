"""Where the script stands, so that a newcomer enters it at the last commit.

A position names one section call by its way through the program: for each loop that is open,
which loop it is within its parent and which iteration it is in, and last, which section call
it is within the innermost iteration. `(0, 3, 0, 17, 0)` is the first section call in iteration
17 of the first loop in iteration 3 of the first loop of the script. Positions compare as
tuples in program order, so "already committed" is `position <= committed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Of a section, or of a collective between sections: its last number is negative.
Position = tuple[int, ...]

# Of how many completed loops the last iteration is known.
_MOST_DONE = 16


@dataclass
class _Loop:
    ordinal: int
    iteration: int = -1
    units: int = 0
    """Loops and sections met so far in the current iteration."""
    collectives: int = 0
    """Collectives outside of sections met so far in the current iteration."""


class Entry(NamedTuple):
    """How a loop is entered.

    Attributes:
        depth: A handle for `next_iteration` and `leave_loop`.
        begin: The iteration to begin at, which holds the last commit if that lies in this loop;
            None if there is none left to go through.
        is_done: Whether the whole loop is committed: then `begin` is its last iteration.
        kept: What it kept of that.
    """

    depth: int
    begin: int | None
    is_done: bool = False
    kept: Any = None


@dataclass
class Cursor:
    """The open loops of a script, and the position of the last commit.

    Args:
        committed: Position of the last committed section; None if there is none.
    """

    committed: Position | None = None
    behind: bool = False
    """Whether the script has still to come to the last commit, which another process made."""
    done: dict[Position, tuple[int, Any]] = field(default_factory=lambda: {})
    """Completed loops within iterations that are open: last iteration, what the loop keeps of it.

    A newcomer goes through that iteration, for the variables that it leaves behind.
    """
    _stack: list[_Loop] = field(default_factory=lambda: [_Loop(0)])

    def prefix(self) -> Position:
        """Return the position of the innermost open iteration."""
        return tuple(part for loop in self._stack[1:] for part in (loop.ordinal, loop.iteration))

    def enter_section(self) -> Position:
        """Return the position of a section call that begins now."""
        return (*self.prefix(), self._next_unit())

    def enter_collective(self) -> Position:
        """Return the position of a collective that is issued between sections now."""
        loop = self._stack[-1]
        loop.collectives += 1
        return (*self.prefix(), -loop.collectives)

    def is_committed(self, position: Position) -> bool:
        """Tell whether the section call at `position` is already committed."""
        return self.committed is not None and position <= self.committed

    def enter_loop(self) -> Entry:
        """Open a loop."""
        place = (*self.prefix(), self._next_unit())
        self._stack.append(_Loop(place[-1]))
        depth = len(self._stack) - 1
        head = () if self.committed is None else self.committed[: len(place)]
        if self.committed is not None and head == place and len(self.committed) > len(place):
            return Entry(depth, self.committed[len(place)])
        if place > head:
            return Entry(depth, 0)
        iteration, kept = self.done.get(place, (None, None))
        return Entry(depth, iteration, is_done=True, kept=kept)

    def next_iteration(self, depth: int, iteration: int) -> None:
        """Begin `iteration` of the loop at `depth`; loops left open inside it are closed."""
        del self._stack[depth + 1 :]
        place = self._place(depth)
        for each in list(self.done):
            if each[: len(place)] == place and each[len(place) :][:1] not in ((), (iteration,)):
                del self.done[each]  # of an earlier iteration
        loop = self._stack[depth]
        loop.iteration = iteration
        loop.units = loop.collectives = 0

    def leave_loop(self, depth: int, kept: Any = None) -> None:
        """Close the loop at `depth` and everything inside it.

        Args:
            depth: From `enter_loop`.
            kept: What it needs to come to its last iteration again.
        """
        if len(self._stack) > depth and self._stack[depth].iteration >= 0:
            place = self._place(depth)
            self.done.pop(place, None)
            self.done[place] = (self._stack[depth].iteration, kept)
            while len(self.done) > _MOST_DONE:
                del self.done[next(iter(self.done))]
        del self._stack[depth:]

    def is_live(self, position: Position, latest: Position | None = None) -> bool:
        """Tell whether a newcomer may come to `position` again.

        That is where it lies in an iteration that holds the last commit, or in the last iteration
        of a loop that was completed in one.

        Args:
            position: Of a section, or a collective.
            latest: The last commit; `committed` by default.
        """
        at = latest or self.committed
        if at is not None and position[:-1] == at[: len(position) - 1]:
            return True
        return any((*place, last) == position[:-1] for place, (last, _) in self.done.items())

    def _place(self, depth: int) -> Position:
        outer = (part for loop in self._stack[1:depth] for part in (loop.ordinal, loop.iteration))
        return (*outer, self._stack[depth].ordinal)

    def _next_unit(self) -> int:
        loop = self._stack[-1]
        loop.units += 1
        return loop.units - 1
