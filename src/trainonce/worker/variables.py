"""Plain variables of the script around a step, which whoever takes the rank over gets as well.

Counters, sums, the best metric so far, lists of a few numbers: whatever has changed since the first
step, in the frames that lead to a step's call, and in the user's own objects there. A process
that takes a rank over has come to the last commit by another way (loops that it left out, values
that are lost); there it gets the variables that its predecessor had.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trainonce import settings
from trainonce.errors import EncodingError
from trainonce.wire import encoding
from trainonce.worker.copies import assign_tree, copy_tree
from trainonce.worker.plain import container, same
from trainonce.worker.scopes import scopes
from trainonce.worker.values import LazyMean

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from trainonce.worker.scopes import Scope

# Of all variables together, in scalars: they are looked at in every step.
_MOST_PARTS = 512

_ABSENT = object()


@dataclass(slots=True)
class _Known:
    """What is known of the plain variables of one scope."""

    first: dict[str, Any]
    """At the first look, copied."""
    last: dict[str, Any]
    """At the last, copied: what is changed in place would not be recognised otherwise."""
    changed: set[str] = field(default_factory=lambda: set())
    """Those that have changed since the first."""

    def update(self, present: dict[str, Any]) -> bool:
        """Take note of `present`, and tell whether any of it has changed since the last look."""
        last = self.last
        differing = [
            name
            for name, value in present.items()
            if last.get(name, _ABSENT) is not value and not same(last.get(name, _ABSENT), value)
        ]
        for name in differing:
            last[name] = copy_tree(present[name])
        self.changed.update(differing)
        return bool(differing)


class Variables:
    """What is known of the variables around the calls of steps."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._taken = b""
        self._names: list[Any] = []
        """Of what was taken, and of what is too large for that."""
        self._restored: dict[str, dict[str, Any]] = {}
        self._opening: dict[str, dict[str, Any]] = {}
        self._is_on = settings.VARIABLES.get() != "0"
        self._left_out: set[str] = set()
        self._large: dict[tuple[str, str], tuple[int, int]] = {}
        self.missing: list[str] = []
        """Variables of the predecessor that were too large to be taken."""

    def take(self, frame: FrameType) -> bytes:
        """Return the variables that have changed since the first call, encoded.

        Args:
            frame: Where the step is called.
        """
        if not self._is_on:
            return b""
        found: dict[str, dict[str, Any]] = {}
        is_new = False
        for scope, present in self._look(frame):
            scope.let_go()
            known = self._known[scope.key]
            is_new |= known.update(present)
            changed = known.changed
            found[scope.key] = {name: value for name, value in present.items() if name in changed}
        names = [len(self._left_out), *((key, *values) for key, values in found.items())]
        if is_new or names != self._names:
            self._taken = self._encode(found)
            self._names = names
        return self._taken

    def _encode(self, found: dict[str, dict[str, Any]]) -> bytes:
        try:
            return encoding.encode([found, sorted(self._left_out)])
        except EncodingError:  # in a script that keeps its `locals()`, say: they hold themselves
            for values in found.values():
                for name in [name for name, value in values.items() if not _has_encoding(value)]:
                    del values[name]
                    self._left_out.add(name)
            return encoding.encode([found, sorted(self._left_out)])

    def begin(self, frame: FrameType) -> None:
        """Take note of the variables around a call that is skipped."""
        if self._is_on:
            for scope, _ in self._look(frame):
                scope.let_go()

    def _look(self, frame: FrameType) -> Iterator[tuple[Scope, dict[str, Any]]]:
        """Yield the scopes around a call with what is plain in them, and note what is new."""
        left = _MOST_PARTS
        for scope in scopes(frame):
            present, measured = scope.plain()
            for name, measure in measured:
                value = present[name]
                size = measure(value, left)
                if 0 <= size <= left:
                    left -= size
                    continue
                del present[name]
                is_missed = size > left or _would_be_missed(value)
                if is_missed and measure is container:
                    is_missed = self._has_changed(scope.key, name, value)
                if is_missed:
                    self._left_out.add(name)
            if scope.key not in self._known:
                first = {name: copy_tree(value) for name, value in present.items()}
                self._known[scope.key] = _Known(first, dict(first))
            yield scope, present

    def _has_changed(self, key: str, name: str, value: Any) -> bool:
        """Tell whether a container that does not come along is new, another or longer by now."""
        large = (id(value), len(value))
        if key not in self._known:
            self._large[key, name] = large
        return self._large.get((key, name)) != large

    def restore(self, data: bytes | memoryview, opening: bytes | memoryview = b"") -> None:
        """Remember what a predecessor took, for `assign`.

        Args:
            data: At the last commit.
            opening: Where the first step of that iteration was called, if that was another one.
        """
        self._restored, self.missing = encoding.decode(data) if len(data) else ({}, [])
        self._opening = encoding.decode(opening)[0] if len(opening) else self._restored

    def anticipate(self, frame: FrameType) -> None:
        """Give variables their values already where an iteration begins that holds the commit.

        `total += step()` reads `total` before it calls: what `assign` does then comes too late. And
        whether the script comes to the step of the commit at all may depend on them.

        Args:
            frame: Of the loop, or of what it calls.
        """
        for scope, _ in self._look(frame) if self._is_on and self._opening else ():
            for name, value in self._opening.get(scope.key, {}).items():
                scope.values[name] = assign_tree(scope.values.get(name), copy_tree(value))
            scope.write()

    def assign(self, frame: FrameType) -> None:
        """Give the variables around a call the values that the predecessor had there."""
        if not self._is_on:
            return
        for scope, present in self._look(frame):
            wanted, known = self._restored.get(scope.key), self._known[scope.key]
            if wanted is None:
                scope.let_go()
                continue
            known.changed.update(wanted)
            for name, value in present.items():
                if name not in wanted and not same(known.first.get(name, value), value):
                    scope.values[name] = assign_tree(value, copy_tree(known.first[name]))
            for name, value in wanted.items():
                scope.values[name] = assign_tree(scope.values.get(name), value)
            scope.write()
        self._restored = self._opening = {}


def _has_encoding(value: Any) -> bool:
    try:
        encoding.encode(value)
    except EncodingError:
        return False
    return True


def _would_be_missed(value: Any) -> bool:
    """Recognise what scripts keep that is not plain: the best weights, averages of `run.mean`.

    A batch is not: its tensors have names without dots.
    """
    if isinstance(value, dict) and value:
        name, first = next(iter(value.items()))
        return isinstance(first, torch.Tensor) and type(name) is str and "." in name
    return type(value) is list and bool(value) and type(value[-1]) is LazyMean
