"""Where the variables around a step's call are: in frames, and in the user's own objects there."""

from __future__ import annotations

import ctypes
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from trainonce.worker.plain import NOT_THE_USERS, measures, not_plain, number, own_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

    from trainonce.worker.plain import Measure

_MOST_FRAMES = 8
_MOST_OBJECTS = 32
# Of the dict of a frame's variables: the frame's own, `Scope.values`, `getrefcount`.
_OUR_REFERENCES = 3


class _Layout(NamedTuple):
    """What the names and types of variables tell by themselves.

    Attributes:
        plain: Names of those that may be plain values.
        measured: The ones among them that are no numbers, with what measures them.
        leading: Names of the user's own objects, and of containers, which may hold some.
    """

    plain: list[str]
    measured: list[tuple[str, Measure]]
    leading: list[str]


@functools.lru_cache(maxsize=1024)  # few names and types change from step to step
def _layout(names: tuple[str, ...], kinds: tuple[type, ...]) -> _Layout:
    layout = _Layout([], [], [])
    for name, kind in zip(names, kinds, strict=True):
        measure = measures[kind]
        if measure is own_object or kind in (dict, list, tuple):
            layout.leading.append(name)
        if measure not in (not_plain, own_object) and name[:2] != "__":
            layout.plain.append(name)
            if measure is not number:
                layout.measured.append((name, measure))
    return layout


class Scope:
    """The variables of one frame, or of one object.

    Args:
        key: Names the scope, in any process.
        values: The variables by name, to read and to assign to.
        frame: Whose local variables they are.
    """

    __slots__ = ("_frame", "_layout", "_seen", "key", "values")

    def __init__(self, key: str, values: Any, frame: FrameType | None = None) -> None:
        self.key = key
        self.values = values
        self._frame = frame
        self._seen: dict[str, Any] = dict(values)  # other threads may add to the values
        self._layout = _layout(tuple(self._seen), tuple(map(type, self._seen.values())))

    @classmethod
    def of(cls, frame: FrameType) -> Scope:
        """Return the variables of a frame."""
        is_local = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        return cls(scope_key(frame), frame.f_locals, frame if is_local else None)

    def plain(self) -> tuple[dict[str, Any], list[tuple[str, Measure]]]:
        """Return what may be plain values, and those among them to measure, no numbers."""
        seen = self._seen
        return {name: seen[name] for name in self._layout.plain}, self._layout.measured

    def leading(self) -> list[tuple[str, Any]]:
        """Return the objects of the user's own classes, and containers, by name."""
        return [(name, self._seen[name]) for name in self._layout.leading]

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


def scope_key(frame: FrameType) -> str:
    """Return what names a frame's function in any process."""
    return f"{_module_of(frame)}.{frame.f_code.co_qualname}"


def is_the_users(frame: FrameType) -> bool:
    """Tell whether a frame executes code of neither torch nor ours."""
    return _module_of(frame).partition(".")[0] not in NOT_THE_USERS


def _module_of(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def scopes(frame: FrameType) -> Iterator[Scope]:
    """Yield the scopes that lead to `frame`, from the inside out."""
    here: FrameType | None = frame
    for _ in range(_MOST_FRAMES):
        if here is None:
            return
        if is_the_users(here):
            scope = Scope.of(here)
            objects = _objects(scope.key, scope.leading())
            yield scope
            yield from objects
            if scope.values is here.f_globals:
                return
        here = here.f_back


def _objects(key: str, leading: Iterable[tuple[str, Any]], deep: int = 3) -> list[Scope]:
    """Return the scopes of objects among `leading`, in containers there, and in these."""
    found: list[Scope] = []
    for name, value in leading:
        inner = f"{key}.{name}"
        inside: Iterable[tuple[str, Any]] = ()
        if measures[type(value)] is own_object:
            scope = Scope(inner, vars(value))
            found.append(scope)
            inside = scope.leading()
        elif type(value) is dict and len(value) <= _MOST_OBJECTS:
            inside = list(value.items())
        elif type(value) in (list, tuple) and 0 < len(value) <= _MOST_OBJECTS:
            if measures[type(value[0])] is own_object:  # of one kind, as callbacks and metrics are
                inside = [(str(index), each) for index, each in enumerate(value)]
        if deep and inside and len(found) < _MOST_OBJECTS:
            found += _objects(inner, inside, deep - 1)
    return found[:_MOST_OBJECTS]
