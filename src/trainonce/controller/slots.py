"""The places that a job has for its workers: which are free, which are lost, who shares one.

A slot is a device, or a share of a host without any. A job has as many as it was given: one a
rank and one a spare. A process that dies leaves its slot free. A slot is lost while the device
is: the fault plan, a health signal or a drain says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainonce.controller.policy import SlotStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trainonce.controller.handle import WorkerHandle


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker runs, or could.

    Args:
        host: Name of the host.
        slot: Number of the slot.
        device: PCI address of its GPU; empty for none, or where it is not known.
        worker: Who is there; -1 for nobody in particular.
    """

    host: str
    slot: int
    device: str = ""
    worker: int = -1


def names_of(place: Place) -> tuple[str, str]:
    """Return what a place is called where no device has a name: the slot, and the process."""
    return f"slot{place.slot}", f"worker{place.worker}"


@dataclass(kw_only=True)
class Slots:
    """The slots of one job.

    Args:
        count: How many.
        host: Where they are.
        lost: Those that the fault plan took.
        closed: Each tells of a place whether no worker is to be started there.
    """

    count: int
    host: str
    lost: set[int] = field(default_factory=lambda: set())
    closed: dict[object, Callable[[Place], bool]] = field(default_factory=lambda: {})
    _devices: dict[int, str] = field(default_factory=lambda: {})

    def note_device(self, slot: int, device: str) -> None:
        """Take note which GPU a worker found in `slot`."""
        self._devices[slot] = device

    def is_closed(self, place: Place) -> bool:
        """Tell whether something says that no worker is to be started in `place`."""
        return any(test(place) for test in self.closed.values())

    def is_usable(self, slot: int) -> bool:
        """Tell whether a worker may be started in `slot`."""
        place = Place(host=self.host, slot=slot, device=self._devices.get(slot, ""))
        return slot not in self.lost and not self.is_closed(place)

    def statuses(self, workers: Iterable[WorkerHandle]) -> list[SlotStatus]:
        """Return where the slots stand, as the policy wants to know it."""
        found = [handle.slot for handle in workers if handle.lives]
        return [
            SlotStatus(slot=slot, usable=self.is_usable(slot), workers=found.count(slot))
            for slot in range(self.count)
        ]


def guests(ranked: Iterable[WorkerHandle]) -> dict[int, int]:
    """Return the ranks that share another rank's slot, each with that rank.

    Of the ranks in one slot, the one whose worker was started first is at home there.
    """
    at_home: dict[int, WorkerHandle] = {}
    found: dict[int, int] = {}
    for handle in sorted(ranked, key=lambda handle: handle.worker):
        host = at_home.setdefault(handle.slot, handle)
        if host is not handle:
            found[handle.rank] = host.rank
    return found
