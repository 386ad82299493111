"""Plain variables of the script around a step, which whoever takes the rank over gets as well.

Counters, sums, the best metric so far, lists of a few numbers: whatever has changed since the first
step, in the frames that lead to a step's call, and in the user's own objects there. A process
that takes a rank over has come to the last commit by another way (loops that it left out, values
that are lost); there it gets the variables that its predecessor had. Larger ones take a way of
their own (`large`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trainonce import settings
from trainonce.errors import EncodingError
from trainonce.wire import encoding
from trainonce.worker.copies import assign_tree, copy_tree
from trainonce.worker.large import LargeVariables
from trainonce.worker.plain import container, module, same
from trainonce.worker.scopes import scopes
from trainonce.worker.values import holds_means, pack_settled, unpack_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

    from trainonce.worker.large import Kept
    from trainonce.worker.mirror import Place
    from trainonce.worker.plain import Measure
    from trainonce.worker.scopes import Scope
    from trainonce.worker.values import LazyMean

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
    averages: set[str] = field(default_factory=lambda: set())
    """Those that hold averages of `run.mean`."""

    def __post_init__(self) -> None:
        self.averages.update(name for name, value in self.first.items() if holds_means(value))

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
            if holds_means(present[name]):
                self.averages.add(name)
            else:
                self.averages.discard(name)
        self.changed.update(differing)
        return bool(differing)


class Taken:
    """Variables as they were at one look, to be encoded when they are published.

    Not before, since averages of the last step in them are not there yet at the look.

    Args:
        found: By scope and name, copied.
        averages: Scope and name of those with averages.
        left_out: Scope and name of what is too large; grows by what has no encoding.
        data: All of it, if it is encoded.
    """

    def __init__(
        self,
        found: dict[str, dict[str, Any]],
        averages: list[tuple[str, str]],
        left_out: set[tuple[str, str]],
        data: bytes | None = None,
    ) -> None:
        self._found = found
        self._averages = averages
        self._left_out = left_out
        self._data = data

    @classmethod
    def of(cls, data: bytes | memoryview) -> Taken:
        """Return what was encoded elsewhere."""
        return cls({}, [], set(), bytes(data))

    def encoded(self, means: Sequence[LazyMean]) -> bytes:
        """Return them encoded; waits for averages of earlier steps than the present one.

        Args:
            means: Those of the step that is being committed, which are not reduced yet.
        """
        if self._data is not None:
            return self._data
        found, settled = self._found, True
        for key, name in self._averages:
            packed, is_settled = pack_settled(self._found[key][name], means)
            settled = settled and is_settled
            found = {**found, key: {**found[key], name: packed}}
        data = self._encode(found)
        if settled:
            self._data, self._found = data, {}
        return data

    def _encode(self, found: dict[str, dict[str, Any]]) -> bytes:
        try:
            return encoding.encode([found, self._names_left_out()])
        except EncodingError:  # in a script that keeps its `locals()`, say: they hold themselves
            for key, values in found.items():
                for name in [name for name, value in values.items() if not _has_encoding(value)]:
                    del values[name]
                    self._left_out.add((key, name))
            return encoding.encode([found, self._names_left_out()])

    def _names_left_out(self) -> list[str]:
        return sorted({name for _, name in self._left_out})


NOTHING = Taken.of(b"")


class Variables:
    """What is known of the variables around the calls of steps.

    Args:
        keep: Keeps the large ones, as `LargeVariables` says.
    """

    def __init__(self, keep: Callable[[bytes, list[Place]], Place | None]) -> None:
        self.large = LargeVariables(keep)
        self._known: dict[str, _Known] = {}
        self._taken = NOTHING
        self._names: list[Any] = []
        """Of what was taken, and of what is too large for that; and changes of large ones."""
        self._restored: dict[str, dict[str, Any]] = {}
        self._opening: dict[str, dict[str, Any]] = {}
        self._is_on = settings.VARIABLES.get() != "0"
        self._left_out: set[tuple[str, str]] = set()
        self._identities: dict[tuple[str, str], tuple[int, int]] = {}
        self.missing: list[str] = []
        """Variables of the predecessor that were too large to be taken."""

    def take(self, frame: FrameType, *, begins: bool = False) -> Taken:
        """Return the variables that have changed since the first call.

        Args:
            frame: Where the step is called.
            begins: The step is about to begin.
        """
        if not self._is_on:
            return NOTHING
        self.large.begin(step=begins)
        found: dict[str, dict[str, Any]] = {}
        averages: list[tuple[str, str]] = []
        is_new = False
        for scope, present in self._look(frame, takes=True):
            scope.let_go()
            known = self._known[scope.key]
            is_new |= known.update(present)
            changed, last = known.changed, known.last
            found[scope.key] = {name: last[name] for name in present if name in changed}
            averages += [(scope.key, name) for name in known.averages if name in found[scope.key]]
        names = [(key, *values) for key, values in found.items()]
        names += [frozenset(self._left_out), self.large.num_changes]
        if is_new or names != self._names:
            self._taken = Taken(found, averages, self._left_out)
            self._names = names
        return self._taken

    def begin(self, frame: FrameType) -> None:
        """Take note of the variables around a call that is skipped."""
        if self._is_on:
            for scope, _ in self._look(frame):
                scope.let_go()

    def _look(
        self, frame: FrameType, *, takes: bool = False
    ) -> Iterator[tuple[Scope, dict[str, Any]]]:
        """Yield the scopes around a call with what is plain in them, and note what is new.

        Args:
            frame: Of the call.
            takes: What has changed is to be kept.
        """
        looks: list[tuple[Scope, dict[str, Any], list[tuple[str, Measure]]]] = []
        total = 0
        for scope in scopes(frame):
            present, measured = scope.plain()
            for name, measure in measured:
                size = measure(present[name], _MOST_PARTS)
                if 0 <= size <= _MOST_PARTS:
                    total += size
                else:
                    value = present.pop(name)
                    if not self._is_kept(scope.key, name, value, takes=takes):
                        self._leave_out(scope.key, name, value, measure, size)
            looks.append((scope, present, measured))
        if total > _MOST_PARTS:
            self._leave_out_largest(looks, total)
        for scope, present, _ in looks:
            if scope.key not in self._known:
                first = {name: copy_tree(value) for name, value in present.items()}
                self._known[scope.key] = _Known(first, dict(first))
            yield scope, present

    def _is_kept(self, key: str, name: str, value: Any, *, takes: bool) -> bool:
        """Tell whether a variable that is not plain, or too large, comes along all the same."""
        if key not in self._known:
            self.large.first(key, name, value, takes=takes)
        elif takes and self.large.look(key, name, value):
            self._left_out.discard((key, name))
            return True
        elif takes and self.large.is_refused(key, name):
            self._left_out.add((key, name))
        return False

    def _leave_out_largest(
        self, looks: list[tuple[Scope, dict[str, Any], list[tuple[str, Measure]]]], total: int
    ) -> None:
        """Leave out the largest variables, so that one that grows does not oust all others."""
        sizes = [
            (measure(present[name], _MOST_PARTS), scope, present, name, measure)
            for scope, present, measured in looks
            for name, measure in measured
            if name in present
        ]
        for size, scope, present, name, measure in sorted(sizes, key=lambda each: -each[0]):
            if total <= _MOST_PARTS:
                return
            total -= size
            self._leave_out(scope.key, name, present.pop(name), measure, _MOST_PARTS + 1)

    def _leave_out(self, key: str, name: str, value: Any, measure: Measure, size: int) -> None:
        """Take note of a variable that does not come along, if that will be missed."""
        if measure is module:
            if (key, name) in self._left_out:
                return  # to look for its parameters among what is protected takes a while
            is_missed = self._has_changed(key, name, value, 0) and self.large.is_apart(value)
            if not is_missed:
                self._identities[key, name] = (id(value), 0)
        else:
            is_missed = size > _MOST_PARTS or _would_be_missed(value)
            if is_missed and measure is container:
                is_missed = self._has_changed(key, name, value, len(value))
        if is_missed:
            self._left_out.add((key, name))

    def _has_changed(self, key: str, name: str, value: Any, length: int) -> bool:
        """Tell whether what does not come along is new, another or longer by now."""
        identity = (id(value), length)
        if key not in self._known:
            self._identities[key, name] = identity
        return self._identities.get((key, name)) != identity

    def restore(
        self,
        data: bytes | memoryview,
        opening: bytes | memoryview = b"",
        means: Sequence[LazyMean] = (),
        large: Iterable[Kept] = (),
    ) -> None:
        """Remember what a predecessor took, for `assign`.

        Args:
            data: At the last commit.
            opening: Where the first step of that iteration was called, if that was another one.
            means: Those of the last commit's step.
            large: The large ones.
        """
        found, left_out = encoding.decode(data) if len(data) else ({}, [])
        self.missing = [*left_out, *self.large.restore(large)]
        self._restored = unpack_value(found, means)
        first = encoding.decode(opening)[0] if len(opening) else found
        self._opening = unpack_value(first, means)

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
            # As of the commit: what matters is that they are there.
            for name, value in self.large.of(scope.key).items():
                if type(scope.values.get(name)) is not type(value):
                    scope.values[name] = copy_tree(value)
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
            for name, value in self.large.of(scope.key).items():
                scope.values[name] = assign_tree(scope.values.get(name), value)
                self.large.adopt(scope.key, name, scope.values[name])
            scope.write()
        self.large.forget_restored()
        self._restored = self._opening = {}


def _has_encoding(value: Any) -> bool:
    try:
        encoding.encode(value)
    except EncodingError:
        return False
    return True


def _would_be_missed(value: Any) -> bool:
    """Recognise what scripts keep that is not plain: the best weights.

    A batch is not: its tensors have names without dots.
    """
    if not isinstance(value, dict) or not value:
        return False
    name, first = next(iter(value.items()))
    return isinstance(first, torch.Tensor) and type(name) is str and "." in name
