"""What one host stamped, as a file that others may read without trusting it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from trainonce.fleet.records import Record, address, count

_MAX_STAMPS = 20_000_000

# Pair, 0 or 1 within it, and when it was sent or arrived, in nanoseconds.
Stamp = tuple[int, int, int]


@dataclass(kw_only=True)
class ClockRecord(Record):
    """What one host sent and received, on its own clock.

    Args:
        host: Its address.
        stamps: "kernel", or "user" where the kernel gave none.
        sent: For each peer, the probes sent.
        received: For each peer, the probes that arrived.
        unreachable: Peers that never answered.
        strangers: Packets that were not from a peer, or not authentic.
    """

    FORMAT = "trainonce-clocks-1"
    COMMAND = "trainonce fleet clock-probe"
    MAX_FILE_BYTES = 512 << 20

    host: str
    stamps: str = "user"
    sent: dict[str, list[Stamp]] = field(default_factory=lambda: {})
    received: dict[str, list[Stamp]] = field(default_factory=lambda: {})
    unreachable: list[str] = field(default_factory=lambda: [])
    strangers: int = 0

    @classmethod
    def _from_raw(cls, raw: Any) -> Self:
        return cls(
            host=address(raw["host"]),
            stamps=raw["stamps"],
            sent={address(peer): _stamps(each) for peer, each in raw["sent"].items()},
            received={address(peer): _stamps(each) for peer, each in raw["received"].items()},
            unreachable=[address(peer) for peer in raw["unreachable"]],
            strangers=count(raw["strangers"]),
        )


def _stamps(value: Any) -> list[Stamp]:
    if not isinstance(value, list) or len(value) > _MAX_STAMPS:
        raise ValueError("stamps that are no list")
    stamps: list[Stamp] = []
    for pair, which, time_ns in value:
        if {type(pair), type(which), type(time_ns)} != {int} or which not in (0, 1):
            raise ValueError(f"a stamp {[pair, which, time_ns]}")
        if not 0 <= pair < 1 << 32 or not 0 <= time_ns < 1 << 63:
            raise ValueError(f"a stamp {[pair, which, time_ns]}")
        stamps.append((pair, which, time_ns))
    return stamps
