"""A page of shared memory on which a worker says where it stands.

The worker writes it on its hot path (well under a microsecond a field); the launcher polls
it. Nothing is sent, so a healthy step costs no message. Times are CLOCK_MONOTONIC
nanoseconds, which all processes of one host share.
"""

from __future__ import annotations

import enum
import mmap
import os

_FIELDS = (
    "format",  # layout version
    "phase",  # Phase
    "commits",  # committed steps
    "section",  # calls of step functions begun, in this worker
    "issued",  # collectives issued since the start
    "completed",  # collectives completed since the start
    "changed_mono_ns",  # when phase, commits, issued or completed last changed
    "section_mono_ns",  # when the open section began; 0 outside
    "step_ns",  # duration of the last committed section
    "samples",  # samples consumed by committed steps, this rank
    "tokens",  # tokens consumed by committed steps, this rank; 0 where unknown
    "flops",  # floating-point operations of one step, this rank; 0 where unknown
    "generation",  # the generation this worker is consistent with
    "busy_until_mono_ns",  # saving or compiling: not a hang before this
    "busy_ns",  # last committed section: until its last collective was issued, less waiting
    "loader_ns",  # waited for the loader for the last committed section
    "peak_flops",  # operations per second of this rank's device at best; 0 where unknown
    "loss_bits",  # the last recorded scalar value, as float64 bits; NaN where none
)
_SIZE = 8 * len(_FIELDS)
_FORMAT = 2


class Phase(enum.IntEnum):
    """What a worker is doing."""

    STARTING = 0
    SETUP = 1
    PARKED = 2
    BETWEEN = 3
    COMPUTING = 4
    WAITING = 5
    UPDATING = 6
    RECOVERING = 7
    DRAINED = 8
    DONE = 9
    ENDING = 10
    """The script has ended; state is saved, and other ranks are waited for."""


class Progress:
    """The shared page, from either side. Fields read and write as 64-bit integers.

    Args:
        fd: Descriptor of at least one page of shared memory; duplicated, not owned.
    """

    __slots__ = ("_map", "_words")

    INDEX = {name: index for index, name in enumerate(_FIELDS)}

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _SIZE)
        self._words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls) -> tuple[Progress, int]:
        """Make a new page; return it and its descriptor, which the caller owns."""
        fd = os.memfd_create("trainonce-progress", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        page = cls(fd)
        page["format"] = _FORMAT
        return page, fd

    @classmethod
    def create_private(cls) -> Progress:
        """Make a page that nobody else reads."""
        page, fd = cls.create()
        os.close(fd)
        return page

    def __getitem__(self, field: str) -> int:
        return self._words[self.INDEX[field]]

    def __setitem__(self, field: str, value: int) -> None:
        self._words[self.INDEX[field]] = value

    def snapshot(self) -> dict[str, int]:
        """Return every field."""
        return dict(zip(_FIELDS, self._words.tolist(), strict=True))

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._map.close()
