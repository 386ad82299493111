"""This rank's mirror: made when it is needed first, and made anew when it is too small."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.wire.messages import Mirror as MirrorMessage
from trainonce.wire.messages import Note
from trainonce.worker.free_memory import SHARE, available_bytes
from trainonce.worker.large import first_fit
from trainonce.worker.mirror import Mirror, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.worker.spare import Promotion

_SLACK_BYTES = 64 << 10
# Commits of which the mirror may have a record, counting the one in flight.
_RECENT = 4
_TOLD_BYTES = 100_000_000


class OwnMirror:
    """Writes records and large variables, and tells the launcher of the memory they lie in.

    Args:
        world_size: Number of ranks.
        promotion: The rank, now or later.
        notify: Sends a message to the launcher, and descriptors with it.
    """

    def __init__(
        self, world_size: int, promotion: Promotion, notify: Callable[..., object]
    ) -> None:
        self._mirror: Mirror | None = None
        self._world_size = world_size
        self._promotion = promotion
        self._notify = notify
        self._mentioned: dict[int, set[Place]] = {}
        """By committed steps: places of the area of which records that may be asked for tell."""

    @property
    def size_bytes(self) -> int:
        """Size of the memory."""
        return 0 if self._mirror is None else self._mirror.size_bytes

    def adopt(self, fd: int) -> None:
        """Go on with the mirror of the process that held this rank."""
        self._mirror = Mirror(fd)

    def find(self, commits: int) -> bytes | None:
        """Return what was published last for `commits` committed steps."""
        found = self._mirror.find(commits) if self._mirror is not None else None
        return None if found is None else found.payload

    def publish(
        self, commits: int, payload: bytes, mentioned: Sequence[Place], *, final: bool
    ) -> None:
        """Write a record.

        Args:
            commits: Committed steps once this record's step is committed.
            payload: The record.
            mentioned: What it says of the area.
            final: At the commit; else ahead of it.
        """
        if self._mirror is None or not self._mirror.fits(len(payload)):
            self._grow(payload_bytes=2 * len(payload) + _SLACK_BYTES)
        assert self._mirror is not None
        self._mirror.publish(commits, payload, final=final)
        self.hold(commits, mentioned)

    def keep(self, data: bytes, used: Sequence[Place]) -> Place | None:
        """Write a large variable; return where, or None where there is no memory.

        Args:
            data: The variable.
            used: Where others are.
        """
        taken = {*used, *itertools.chain.from_iterable(self._mentioned.values())}
        area_bytes = 0 if self._mirror is None else self._mirror.area_bytes
        place = first_fit(taken, len(data), area_bytes)
        if place is None:
            # Twice what is there, for what is to replace it; and never only small gaps.
            end = max((each.offset + each.size for each in taken), default=0)
            area_bytes = 2 * (len(data) + sum(each.size for each in taken))
            area_bytes = max(area_bytes, end + len(data))
            if area_bytes > SHARE * available_bytes() / self._world_size:
                return self._tell_no_room(f"{area_bytes / 1e6:.0f} MB a rank")
            try:
                self._grow(area_bytes=area_bytes)
            except OSError as error:
                return self._tell_no_room(str(error))
            place = first_fit(taken, len(data), area_bytes)
        assert self._mirror is not None
        assert place is not None
        return self._mirror.write(place, data)

    def read(self, place: Place) -> bytes:
        """Return a large variable; nothing where it is not there any more."""
        return b"" if self._mirror is None else self._mirror.read(place)

    def hold(self, commits: int, places: Sequence[Place]) -> None:
        """Overwrite none of these for a while: the record of so many commits mentions them."""
        self._mentioned.setdefault(commits, set()).update(places)
        for old in [each for each in self._mentioned if each <= commits - _RECENT]:
            del self._mentioned[old]

    def _grow(self, *, payload_bytes: int = _SLACK_BYTES, area_bytes: int = 0) -> None:
        """Go on with memory of at least so many bytes in a slot, and in the area."""
        old = self._mirror
        if old is not None:
            payload_bytes = max(payload_bytes, old.payload_bytes)
            area_bytes = max(area_bytes, old.area_bytes)
        new = Mirror.create(payload_bytes, area_bytes)
        if old is not None:
            new.take_over(old)
        self._mirror, rank = new, self._promotion.rank
        self._notify(MirrorMessage(rank=rank, size_bytes=new.size_bytes), (new.fd,))
        if old is not None:
            old.close()
        if rank == 0 and new.area_bytes > _TOLD_BYTES:
            text = (
                f"{new.area_bytes / 1e6:.0f} MB a rank are set aside for copies of large variables"
                f" of the script ({settings.LARGE_VARIABLES_MB.name})"
            )
            self._notify(Note(key=f"large-variables-{new.area_bytes}", text=text))

    def _tell_no_room(self, why: str) -> None:
        text = f"there is no memory for copies of large variables of the script ({why})"
        self._notify(Note(key="large-variables-memory", level="warning", text=text))
