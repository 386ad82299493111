"""Rank-local state in shared memory that outlives the worker.

The worker makes the memory, the launcher holds a descriptor of it, and whoever takes the
rank over reads it. Four slots, each with a checksum, hold the last two commits, what was announced
ahead of the last, and what is announced ahead of the commit in flight: a survivor may stand one
commit behind until this rank's last collective of the step is complete, and then the one before
the last is asked for. What is announced anew for the same commit replaces what was, and a commit
does not, so that a process killed in the middle of a write leaves both commits intact.

Behind the slots is an area for what is too large to be written with every commit. The records say
what lies where in it; what they do not mention is free.

The file, little-endian: a page with its format and the size of a slot; the slots, each a header
and a payload; the area.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from typing import NamedTuple

import xxhash

from trainonce.errors import StateError

_FILE = struct.Struct("<4sIQ")  # magic, format, bytes of a slot
_HEADER = struct.Struct("<4sIQQQII")  # magic, format, serial, commits, length, final, checksum
_MAGIC = b"TOMi"
_FORMAT = 2
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


class Place(NamedTuple):
    """A part of the area behind the slots.

    Attributes:
        offset: In bytes.
        size: In bytes.
        checksum: XXH3-64 of what lies there.
    """

    offset: int
    size: int
    checksum: int = 0


class Mirror:
    """One rank's shared memory.

    Args:
        fd: Descriptor of the memory; owned by the mirror from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size_bytes = os.fstat(fd).st_size
        """Size of the memory, slots and area together."""
        if self.size_bytes < (_SLOTS + 1) * _ALIGN:
            raise StateError(f"a mirror of {self.size_bytes} bytes is too small to be one")
        self._map = mmap.mmap(fd, self.size_bytes)
        magic, version, self._slot_bytes = _FILE.unpack_from(self._map)
        self._area = _ALIGN + _SLOTS * self._slot_bytes
        if magic != _MAGIC or version != _FORMAT or self._area > self.size_bytes:
            raise StateError("a mirror does not begin as one")
        self._serial, self._slot, newest = max(
            self._valid(), default=(0, _SLOTS - 1, None), key=lambda found: found[0]
        )
        self._ahead = newest.commits if newest is not None and not newest.final else None

    @classmethod
    def create(cls, payload_bytes: int, area_bytes: int = 0) -> Mirror:
        """Make a mirror whose slots hold at least `payload_bytes` each.

        Raises:
            OSError: There is not enough memory for the area.
        """
        slot = -(-(payload_bytes + _HEADER.size) // _ALIGN) * _ALIGN
        area = _ALIGN + slot * _SLOTS
        fd = os.memfd_create("trainonce-mirror", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, area)
            if area_bytes:
                # Not just its size: a page that cannot be had would be a SIGBUS later.
                os.posix_fallocate(fd, area, area_bytes)
            os.pwrite(fd, _FILE.pack(_MAGIC, _FORMAT, slot), 0)
        except OSError:
            os.close(fd)
            raise
        return cls(fd)

    @property
    def area_bytes(self) -> int:
        """Size of the area behind the slots."""
        return self.size_bytes - self._area

    def write(self, place: Place, data: bytes) -> Place:
        """Write to a free place of the area; return it with the checksum."""
        begin = self._area + place.offset
        self._map[begin : begin + len(data)] = data
        return place._replace(checksum=xxhash.xxh3_64_intdigest(data))

    def read(self, place: Place) -> bytes:
        """Return what lies in a place of the area; nothing where that is something else by now."""
        begin = self._area + place.offset
        data = self._map[begin : begin + place.size]
        return data if xxhash.xxh3_64_intdigest(data) == place.checksum else b""

    @property
    def payload_bytes(self) -> int:
        """Most that can be published in one record."""
        return self._slot_bytes - _HEADER.size

    def fits(self, payload_bytes: int) -> bool:
        """Tell whether a payload of this size can be published."""
        return payload_bytes <= self.payload_bytes

    def take_over(self, other: Mirror) -> None:
        """Copy what another mirror holds, which is no larger."""
        if other.area_bytes:
            with memoryview(other._map) as view, view[other._area :] as area:
                self._map[self._area : self._area + len(area)] = area
        for record in other.records():
            self.publish(record.commits, record.payload, final=record.final)

    def publish(self, commits: int, payload: bytes, *, final: bool) -> None:
        """Write a record. Atomic: readers see all of it or none."""
        serial = self._serial + 1
        if final or self._ahead != commits:
            self._slot = (self._slot + 1) % _SLOTS
        self._ahead = None if final else commits
        base = self._base(self._slot)
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

    def _base(self, slot: int) -> int:
        return _ALIGN + slot * self._slot_bytes

    def _valid(self) -> list[tuple[int, int, Record]]:
        """Return serial number, slot and record of each slot that is intact."""
        found: list[tuple[int, int, Record]] = []
        for slot in range(_SLOTS):
            base = self._base(slot)
            magic, version, serial, commits, length, final, checksum = _HEADER.unpack(
                self._map[base : base + _HEADER.size]
            )
            if magic != _MAGIC or version != _FORMAT or length > self.payload_bytes:
                continue
            payload = self._map[base + _HEADER.size : base + _HEADER.size + length]
            if zlib.crc32(payload, serial & 0xFFFFFFFF) == checksum:
                found.append((serial, slot, Record(commits, bool(final), payload)))
        return found
