"""Where a script counts batches with `enumerate`, the count goes on behind those left out."""

from __future__ import annotations

import ctypes
import gc
import sys
from types import GeneratorType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


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
