"""Rank-local state in shared memory that outlives the worker.

The worker makes the memory, the launcher holds a descriptor of it, and whoever takes the
rank over reads it. Four slots, each with a checksum, hold the last two commits, what was announced
ahead of the last, and what is announced ahead of the commit in flight: a survivor may stand one
commit behind until this rank's last collective of the step is complete, and then the one before
the last is asked for. What is announced anew for the same commit replaces what was, and a commit
does not, so that a process killed in the middle of a write leaves both commits intact.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from typing import NamedTuple

from trainonce.errors import StateError

_HEADER = struct.Struct("<4sIQQQII")  # magic, format, serial, commits, length, final, checksum
_MAGIC = b"TOMi"
_FORMAT = 1
_SLOTS = 4
_ALIGN = 4096


class Record(NamedTuple):
    """What one slot holds.

    Attributes:
        commits: Committed steps once this record's step is committed.
        final: Written at the commit; else ahead of the step's last reduction.
        payload: What was published.
    """

    commits: int
    final: bool
    payload: bytes


class Mirror:
    """One rank's shared memory.

    Args:
        fd: Descriptor of the memory; owned by the mirror from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        size = os.fstat(fd).st_size
        if size < _SLOTS * _ALIGN:
            raise StateError(f"a mirror of {size} bytes is too small to be one")
        self._slot_bytes = size // _SLOTS
        self._map = mmap.mmap(fd, size)
        self._serial, self._slot, newest = max(
            self._valid(), default=(0, _SLOTS - 1, None), key=lambda found: found[0]
        )
        self._ahead = newest.commits if newest is not None and not newest.final else None

    @classmethod
    def create(cls, payload_bytes: int) -> Mirror:
        """Make a mirror whose slots hold at least `payload_bytes` each."""
        slot = -(-(payload_bytes + _HEADER.size) // _ALIGN) * _ALIGN
        fd = os.memfd_create("trainonce-mirror", os.MFD_CLOEXEC)
        os.ftruncate(fd, slot * _SLOTS)
        return cls(fd)

    @property
    def size_bytes(self) -> int:
        """Size of the memory, all slots together."""
        return self._slot_bytes * _SLOTS

    def fits(self, payload_bytes: int) -> bool:
        """Tell whether a payload of this size can be published."""
        return payload_bytes + _HEADER.size <= self._slot_bytes

    def publish(self, commits: int, payload: bytes, *, final: bool) -> None:
        """Write a record. Atomic: readers see all of it or none."""
        serial = self._serial + 1
        if final or self._ahead != commits:
            self._slot = (self._slot + 1) % _SLOTS
        self._ahead = None if final else commits
        base = self._slot * self._slot_bytes
        begin = base + _HEADER.size
        # The header goes invalid first and valid last, so a torn write is never believed.
        self._map[base : base + 4] = b"\0\0\0\0"
        self._map[begin : begin + len(payload)] = payload
        self._map[base : base + _HEADER.size] = _HEADER.pack(
            _MAGIC, _FORMAT, serial, commits, len(payload), final, zlib.crc32(payload, serial)
        )
        self._serial = serial

    def find(self, commits: int) -> Record | None:
        """Return the newest record for `commits` committed steps, if one is intact."""
        found = [(serial, each) for serial, _, each in self._valid() if each.commits == commits]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def records(self) -> list[Record]:
        """Return the records that are intact, in the order in which they were published."""
        return [record for _, _, record in sorted(self._valid(), key=lambda found: found[0])]

    def close(self) -> None:
        """Unmap the memory and close the descriptor."""
        self._map.close()
        os.close(self.fd)

    def _valid(self) -> list[tuple[int, int, Record]]:
        """Return serial number, slot and record of each slot that is intact."""
        found: list[tuple[int, int, Record]] = []
        for slot in range(_SLOTS):
            base = slot * self._slot_bytes
            magic, version, serial, commits, length, final, checksum = _HEADER.unpack(
                self._map[base : base + _HEADER.size]
            )
            if magic != _MAGIC or version != _FORMAT or length > self._slot_bytes - _HEADER.size:
                continue
            payload = self._map[base + _HEADER.size : base + _HEADER.size + length]
            if zlib.crc32(payload, serial & 0xFFFFFFFF) == checksum:
                found.append((serial, slot, Record(commits, bool(final), payload)))
        return found
