"""Inputs of a call: finding the nodes and files among them, and putting values in their place."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, cast

from trainonce.graph.node import File, Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEEP: Any = object()


def find(value: object) -> Iterator[Node[Any] | File]:
    """Yield the nodes and files in a value, through plain containers and dataclasses."""
    if isinstance(value, (Node, File)):
        yield cast("Node[Any] | File", value)
    else:
        for child in _children(value):
            yield from find(child)


def replace(value: Any, put: Callable[[Node[Any]], Any]) -> Any:
    """Return `value` with each node in it replaced; what holds none is passed through as is."""
    return swap(value, lambda part: put(part) if isinstance(part, Node) else KEEP)


def swap(value: Any, put: Callable[[Any], Any]) -> Any:
    """Return `value` with parts of it replaced, from the outside in.

    Args:
        value: Anything; searched through plain containers and dataclasses.
        put: Is given each part, and returns what takes its place, or `KEEP` to look within it.
    """
    found = put(value)
    if found is not KEEP:
        return found
    before = _children(value)
    after = [swap(part, put) for part in before]
    if all(new is old for new, old in zip(after, before, strict=True)):
        return value
    if isinstance(value, dict):
        clone = copy.copy(value)  # of a default dict, say, with its factory
        clone.clear()
        clone.update(zip(after[::2], after[1::2], strict=True))
        return clone
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return cast("Any", type(value))._make(after)
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(after)
    clone = copy.copy(value)
    for field, part in zip(dataclasses.fields(value), after, strict=True):
        object.__setattr__(clone, field.name, part)
    return clone


def describe(value: object, limit: int = 60) -> str:
    """Return a short text for an input: shapes and types, and small plain values."""
    if isinstance(value, (Node, File)):
        return repr(value)
    shape = getattr(value, "shape", None)
    if shape is not None:
        kind = type(value).__name__
        return f"{kind}({tuple(shape)}, {getattr(value, 'dtype', '?')})"
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        text = repr(value)
        return text if len(text) <= limit else text[: limit - 1] + "…"
    if isinstance(value, (list, tuple, set, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return []
