"""Memory for batches, lent again when no tensor holds it any more.

A batch of rows is large enough for the allocator to hand its memory back to the system at
each release, and then every new batch pays for fresh pages: up to a third of the time of
reading it. So a few buffers are kept.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Below this the allocator keeps memory by itself.
_SMALL_BYTES = 1 << 16


class Buffers:
    """Arrays of one dtype and row shape, for batches of any size.

    Args:
        dtype: Of the elements.
        shape: Of one row.
        max_free: How many buffers are kept while nobody uses them.
    """

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], max_free: int = 4) -> None:
        self._dtype = dtype
        self._shape = shape
        self._max_free = max_free
        self._free: list[NDArray[Any]] = []
        self._lent: dict[int, tuple[object, NDArray[Any]]] = {}

    def lend(self, num_rows: int) -> NDArray[Any]:
        """Return an array of shape (num_rows, *shape) with any content.

        It is lent for as long as the array, or anything that holds on to it, lives.
        """
        buffer = self._free.pop() if self._free else None
        if buffer is None or len(buffer) != num_rows:
            buffer = np.empty((num_rows, *self._shape), self._dtype)
        if buffer.nbytes < _SMALL_BYTES:
            return buffer
        # The borrower holds a view, so that the buffer itself outlives it.
        view = buffer.view()
        reference = weakref.ref(view, self._returned)
        self._lent[id(reference)] = (reference, buffer)
        return view

    def _returned(self, reference: object) -> None:
        _, buffer = self._lent.pop(id(reference))
        if len(self._free) < self._max_free:
            self._free.append(buffer)
