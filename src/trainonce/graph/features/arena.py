"""One contiguous stretch of addresses over many mapped files.

Rows arrive in many segment files, yet a random batch should be one `np.take`, as over a
single memory-mapped array. So addresses are reserved once, and each file's rows are mapped
into them at a fixed place: row `slot` lies `slot * stride` bytes from the start, whichever
file it is in. Places that no file covers stay inaccessible; they cost no memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from typing import TYPE_CHECKING

import numpy as np

from trainonce.errors import StoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong,
)  # fmt: skip
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE = 0
# Files whose place in memory and in the file agree by this much are mapped by huge pages, as
# plain memory-mapped files are; without, random rows of 2 KB take a third longer.
HUGE_PAGE = 1 << 21
_MAP_FIXED = 0x10
# Address space is reserved, not memory: without this flag Linux may count it against RAM.
_MAP_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0x40


def aligned_rows(stride: int, num_rows: int = 0) -> int:
    """Return the number of rows at whose multiples `num_rows` rows of a file can be mapped.

    The smallest count whose bytes are whole pages; whole huge pages, where that leaves no gap
    larger than the rows themselves.
    """
    huge = HUGE_PAGE // math.gcd(stride, HUGE_PAGE)
    return huge if huge <= num_rows else mmap.PAGESIZE // math.gcd(stride, mmap.PAGESIZE)


class Arena:
    """Rows of `stride` bytes, `num_slots` of them, mapped file by file.

    Args:
        stride: Bytes from one row to the next.
        num_slots: How many rows the reserved addresses hold.

    Raises:
        StoreError: The system does not grant the address space.
    """

    def __init__(self, stride: int, num_slots: int) -> None:
        self.stride = stride
        self.num_slots = num_slots
        self._bytes = max(1, stride * num_slots)
        reserved = self._bytes + HUGE_PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _mmap(None, reserved, _PROT_NONE, flags, -1, 0)
        if address == _FAILED or address is None:
            raise StoreError(
                f"cannot reserve {self._bytes} bytes of address space for rows",
                hint="raise the limit on virtual memory (ulimit -v)",
            )
        self._address = -(-address // HUGE_PAGE) * HUGE_PAGE
        self.__array_interface__ = {
            "shape": (num_slots, stride),
            "typestr": "|u1",
            "data": (self._address, True),
            "version": 3,
        }
        # Arrays made from this object keep it alive, so nothing is unmapped under a reader.
        weakref.finalize(self, _munmap, address, reserved).atexit = False

    def map_rows(self, fd: int, *, offset: int, slot: int, num_rows: int) -> None:
        """Map `num_rows` rows of a file, which start at byte `offset`, to row `slot`.

        Args:
            fd: Readable descriptor; may be closed afterwards.
            offset: A multiple of the page size.
            slot: A multiple of `aligned_rows(stride)`.
            num_rows: How many rows; the file must be that long.
        """
        size = num_rows * self.stride
        start = slot * self.stride
        if start % mmap.PAGESIZE or offset % mmap.PAGESIZE or start + size > self._bytes:
            raise ValueError(f"rows {slot}..{slot + num_rows} do not fit the arena")
        if size == 0:
            return
        where = self._address + start
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _mmap(where, size, mmap.PROT_READ, flags, fd, offset) == _FAILED:
            number = ctypes.get_errno()
            raise StoreError(
                f"cannot map {num_rows} rows: {os.strerror(number)}",
                hint="too many mapped files? see `sysctl vm.max_map_count`",
            )

    def rows(self) -> NDArray[np.uint8]:
        """Return a read-only view of all rows: uint8, shape (num_slots, stride).

        Only mapped rows may be read; the rest is inaccessible memory.
        """
        return np.asarray(self)
