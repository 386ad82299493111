"""Plain variables of the script around a step, which whoever takes the rank over gets as well.

Counters, sums, the best metric so far, lists of a few numbers: whatever has changed since the first
step, in the frames that lead to a step's call, and in the user's own objects there. A process
that takes a rank over has come to the last commit by another way (loops that it left out, values
that are lost); there it gets the variables that its predecessor had.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import inspect
import sys
from collections import Counter, OrderedDict, defaultdict
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce import settings
from trainonce.wire import encoding
from trainonce.worker.copies import assign_tree, copy_tree
from trainonce.worker.values import LazyMean

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# Of all variables together, in scalars: they are looked at in every step.
_MOST_PARTS = 512
_MOST_ELEMENTS = 64
_MOST_FRAMES = 8
# Of the dict of a frame's variables: the frame's own, `_Scope.values`, `_scopes`, `getrefcount`.
_OUR_REFERENCES = 4
_MOST_CHARACTERS = 4096
_MOST_OBJECTS = 32
_NOT_THE_USERS = ("trainonce", "torch", "runpy")

Scopes = dict[str, dict[str, Any]]


class _Kind(enum.Enum):
    NUMBER = enum.auto()
    TEXT = enum.auto()
    CONTAINER = enum.auto()
    TENSOR = enum.auto()
    ARRAY = enum.auto()
    OBJECT = enum.auto()
    OTHER = enum.auto()


_kinds: dict[type, _Kind] = {
    **dict.fromkeys((bool, int, float, complex, type(None)), _Kind.NUMBER),
    **dict.fromkeys((str, bytes), _Kind.TEXT),
    **dict.fromkeys((list, tuple, dict, set, Counter, OrderedDict), _Kind.CONTAINER),
    defaultdict: _Kind.CONTAINER,
    torch.Tensor: _Kind.TENSOR,
    np.ndarray: _Kind.ARRAY,
}
_ABSENT = object()
# Of a `defaultdict`: those that have a name in the encoding.
_FACTORIES = (None, int, float, list, dict, set, str)


def _learn(kind: type) -> _Kind:
    found = _Kind.ARRAY if issubclass(kind, np.generic) else _Kind.OTHER
    if _is_of_the_user(kind.__module__) and "__dict__" in dir(kind):
        found = _Kind.OTHER if hasattr(kind, "state_dict") else _Kind.OBJECT
    return _kinds.setdefault(kind, found)


def _is_of_the_user(module: str) -> bool:
    """Tell whether a module is neither Python's own nor installed from a package."""
    top = module.partition(".")[0]
    if top in _NOT_THE_USERS or top in sys.stdlib_module_names:
        return top == "__main__"
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


class Variables:
    """What is known of the variables around the calls of steps."""

    def __init__(self) -> None:
        self._first: Scopes = {}
        self._changed: dict[str, set[str]] = {}
        self._restored: Scopes = {}
        self._opening: Scopes = {}
        self._last: tuple[Scopes, bytes] = ({}, b"")
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
        found: Scopes = {}
        for key, present, scope in self._look(frame):
            scope.let_go()
            first, changed = self._first[key], self._changed.setdefault(key, set())
            for name, value in present.items():
                if name in changed or first.get(name, _ABSENT) is value:
                    continue
                if name not in first or not _same(first[name], value):
                    changed.add(name)
            found[key] = {name: value for name, value in present.items() if name in changed}
        last, encoded = self._last
        if not encoded or not _same(last, found):
            encoded = encoding.encode([found, sorted(self._left_out)])
            self._last = (copy_tree(found), encoded)
        return encoded

    def begin(self, frame: FrameType) -> None:
        """Take note of the variables around a call that is skipped."""
        if self._is_on:
            for _, _, scope in self._look(frame):
                scope.let_go()

    def _look(self, frame: FrameType) -> Iterator[tuple[str, dict[str, Any], _Scope]]:
        """Yield the scopes around a call with what is plain in them, and note what is new."""
        left, kinds = _MOST_PARTS, _kinds
        for key, scope in _scopes(frame):
            present: dict[str, Any] = {}
            for name, value in scope.values.items():
                kind = kinds.get(type(value))
                if kind is None:
                    kind = _learn(type(value))
                if kind is _Kind.OTHER or kind is _Kind.OBJECT or name[:2] == "__":
                    continue
                if kind is not _Kind.NUMBER:
                    size = _size(value, left)
                    if size > left:
                        if kind is not _Kind.CONTAINER or self._has_changed(key, name, value):
                            self._left_out.add(name)
                        continue
                    if size < 0:
                        if _would_be_missed(value) and self._has_changed(key, name, value):
                            self._left_out.add(name)
                        continue
                    left -= size
                present[name] = value
            if key not in self._first:
                self._first[key] = {name: copy_tree(value) for name, value in present.items()}
            yield key, present, scope

    def _has_changed(self, key: str, name: str, value: Any) -> bool:
        """Tell whether a container that does not come along is new, another or longer by now."""
        large = (id(value), len(value))
        if key not in self._first:
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
        for key, _, scope in self._look(frame) if self._is_on and self._opening else ():
            for name, value in self._opening.get(key, {}).items():
                scope.values[name] = assign_tree(scope.values.get(name), copy_tree(value))
            scope.write()

    def assign(self, frame: FrameType) -> None:
        """Give the variables around a call the values that the predecessor had there."""
        if not self._is_on:
            return
        for key, present, scope in self._look(frame):
            wanted, first = self._restored.get(key), self._first[key]
            if wanted is None:
                scope.let_go()
                continue
            self._changed.setdefault(key, set()).update(wanted)
            for name, value in present.items():
                if name not in wanted and not _same(first.get(name, value), value):
                    scope.values[name] = copy_tree(first[name])
            for name, value in wanted.items():
                scope.values[name] = assign_tree(scope.values.get(name), value)
            scope.write()
        self._restored = self._opening = {}


def counters_of(items: Iterator[Any]) -> list[enumerate[Any]]:
    """Return the `enumerate` objects that count `items`, also through a progress bar."""
    return [
        each
        for each in gc.get_objects()
        if type(each) is enumerate and _hands_on(each.__reduce__()[1][0], items)  # type: ignore[index]
    ]


def _hands_on(source: Any, items: Iterator[Any], deep: int = 3) -> bool:
    """Tell whether `source` is `items`, or a generator of an installed package that yields them."""
    if source is items:
        return True
    frame = source.gi_frame if isinstance(source, GeneratorType) else None
    if not deep or frame is None or "-packages" not in frame.f_code.co_filename:
        return False
    return any(_hands_on(each, items, deep - 1) for each in frame.f_locals.values())


def advance(counter: enumerate[Any], by: int) -> bool:
    """Let an `enumerate` count on as if it had yielded `by` items more.

    Returns:
        False where this interpreter keeps its count in another place than CPython does.
    """
    if sys.implementation.name != "cpython":
        return False
    count = ctypes.c_ssize_t.from_address(id(counter) + object.__basicsize__)
    if count.value != counter.__reduce__()[1][1]:  # type: ignore[index]
        return False
    count.value += by
    return True


class _Scope:
    """The variables of one frame, or of one object."""

    def __init__(self, values: Any, frame: FrameType | None = None) -> None:
        self.values = values
        self._frame = frame

    def write(self) -> None:
        """Make assignments to `values` those of the frame."""
        if self._frame is not None and sys.version_info < (3, 13):
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(self._frame), ctypes.c_int(0))
        self.let_go()

    def let_go(self) -> None:
        """Keep nothing alive: up to Python 3.12 the dict of a frame's variables is a copy.

        Unless the script holds that dict itself, from `locals()`.
        """
        ours = self._frame is not None and sys.version_info < (3, 13)
        if ours and sys.getrefcount(self.values) <= _OUR_REFERENCES:
            self.values.clear()


def _scopes(frame: FrameType) -> Iterator[tuple[str, _Scope]]:
    """Yield the scopes that lead to `frame`, from the inside out."""
    here: FrameType | None = frame
    for _ in range(_MOST_FRAMES):
        if here is None:
            return
        module, code = here.f_globals.get("__name__", ""), here.f_code
        if module.partition(".")[0] not in _NOT_THE_USERS:
            key = f"{module}.{code.co_qualname}"
            values: Any = here.f_locals
            objects = _objects(values)
            yield key, _Scope(values, here if code.co_flags & inspect.CO_OPTIMIZED else None)
            yield from ((f"{key}.{name}", _Scope(vars(value))) for name, value in objects)
            if values is here.f_globals:
                return
        here = here.f_back


def _objects(values: dict[str, Any], deep: int = 3) -> list[tuple[str, Any]]:
    """Return objects of the user's own classes among `values`, in containers there and these."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        kind = _kinds.get(type(value)) or _learn(type(value))
        inside: dict[str, Any] = {}
        if kind is _Kind.OBJECT:
            found.append((name, value))
            inside = vars(value)
        elif type(value) is dict and len(value) <= _MOST_OBJECTS:
            inside = value
        elif type(value) in (list, tuple) and 0 < len(value) <= _MOST_OBJECTS:
            first = type(value[0])  # of one kind, as callbacks and metrics are
            if (_kinds.get(first) or _learn(first)) is _Kind.OBJECT:
                inside = {str(index): each for index, each in enumerate(value)}
        if deep and inside and len(found) < _MOST_OBJECTS:
            found += [(f"{name}.{inner}", each) for inner, each in _objects(inside, deep - 1)]
    return found[:_MOST_OBJECTS]


def _size(value: Any, limit: int) -> int:
    """Return of how many scalars `value` consists; -1: it has other parts, `limit` + 1: of more."""
    kind = _kinds.get(type(value)) or _learn(type(value))
    if kind is _Kind.NUMBER:
        return 1
    if kind is _Kind.TEXT:
        return 1 if len(value) <= _MOST_CHARACTERS else -1
    if kind is _Kind.TENSOR:
        small = value.numel() <= _MOST_ELEMENTS and value.layout is torch.strided
        return 4 if small and value.device.type == "cpu" and not value.requires_grad else -1
    if kind is _Kind.ARRAY:
        return 4 if value.size <= _MOST_ELEMENTS and value.dtype.kind in "biufc" else -1
    if kind is _Kind.OTHER or kind is _Kind.OBJECT:
        return -1
    if len(value) > limit:
        return limit + 1
    total = 1
    if type(value) is defaultdict and value.default_factory not in _FACTORIES:
        return -1
    parts = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
    for part in parts:
        size = _size(part, limit - total)
        if size < 0:
            return -1
        total += size
        if total > limit:
            return limit + 1
    return total


def _would_be_missed(value: Any) -> bool:
    """Recognise what scripts keep that is not plain: the best weights, averages of `run.mean`.

    A batch is not: its tensors have names without dots.
    """
    if isinstance(value, dict) and value:
        name, first = next(iter(value.items()))
        return isinstance(first, torch.Tensor) and type(name) is str and "." in name
    return type(value) is list and bool(value) and type(value[-1]) is LazyMean


def _same(one: Any, other: Any) -> bool:
    if one is other:  # neither changes: what can is kept as a copy
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other
