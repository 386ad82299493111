"""Where the script stands, so that a newcomer enters it at the last commit.

A position names one section call by its way through the program: for each loop that is open,
which loop it is within its parent and which iteration it is in, and last, which section call
it is within the innermost iteration. `(0, 3, 0, 17, 0)` is the first section call in iteration
17 of the first loop in iteration 3 of the first loop of the script. Positions compare as
tuples in program order, so "already committed" is `position <= committed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Of a section, or of a collective between sections: its last number is negative.
Position = tuple[int, ...]

# Of how many completed loops the last iteration is known.
_MOST_DONE = 16


@dataclass(eq=False)
class Loop:
    """One loop that is open.

    Attributes:
        begin: The iteration to begin at, which holds the last commit if that lies in this loop;
            None if there is none left to go through.
        is_done: Whether the whole loop is committed: then `begin` is its last iteration.
        kept: What its owner needs to come to the present iteration again.
    """

    ordinal: int
    begin: int | None = 0
    is_done: bool = False
    kept: Any = None
    iteration: int = -1
    units: int = 0
    """Loops and sections met so far in the current iteration."""
    collectives: int = 0
    """Collectives outside of sections met so far in the current iteration."""


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
    _stack: list[Loop] = field(default_factory=lambda: [Loop(0)])

    def prefix(self) -> Position:
        """Return the position of the innermost open iteration."""
        return tuple(part for loop in self._stack[1:] for part in (loop.ordinal, loop.iteration))

    def place(self) -> Position:
        """Return the position that the next section call would have."""
        return (*self.prefix(), self._stack[-1].units)

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

    def enter_loop(self) -> Loop:
        """Open a loop."""
        place = (*self.prefix(), self._next_unit())
        loop = Loop(place[-1])
        self._stack.append(loop)
        head = () if self.committed is None else self.committed[: len(place)]
        if self.committed is not None and head == place and len(self.committed) > len(place):
            loop.begin = self.committed[len(place)]
        elif place <= head:
            loop.is_done = True
            loop.begin, loop.kept = self.done.get(place, (None, None))
        return loop

    def next_iteration(self, loop: Loop, iteration: int) -> None:
        """Begin `iteration` of `loop`; loops left open inside it are closed.

        One that is gone through beside another, as by `zip`, lies in the iterations of that.
        """
        if loop in self._stack:
            del self._stack[self._stack.index(loop) + 1 :]
        else:
            loop.ordinal = self._next_unit()
            self._stack.append(loop)
        place = self._place(loop)
        for each in list(self.done):
            if each[: len(place)] == place and each[len(place) :][:1] not in ((), (iteration,)):
                del self.done[each]  # of an earlier iteration
        loop.iteration = iteration
        loop.units = loop.collectives = 0

    def leave_loop(self, loop: Loop) -> None:
        """Close `loop` and everything inside it."""
        if loop not in self._stack:
            return
        depth = self._stack.index(loop)
        for each in self._stack[depth:]:
            if each.iteration >= 0:
                place = self._place(each)
                self.done.pop(place, None)
                self.done[place] = (each.iteration, each.kept)
        while len(self.done) > _MOST_DONE:
            del self.done[next(iter(self.done))]
        del self._stack[depth:]

    def open_loops(self) -> list[tuple[int, Any]]:
        """Return the depth of each open loop that keeps something, and what it keeps."""
        return [(depth, loop.kept) for depth, loop in enumerate(self._stack) if loop.kept]

    def depth_of(self, loop: Loop) -> int:
        """Return how many loops are open around `loop`, which is open."""
        return self._stack.index(loop)

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

    def _place(self, loop: Loop) -> Position:
        around = self._stack[1 : self._stack.index(loop)]
        return (*(part for each in around for part in (each.ordinal, each.iteration)), loop.ordinal)

    def _next_unit(self) -> int:
        loop = self._stack[-1]
        loop.units += 1
        return loop.units - 1
