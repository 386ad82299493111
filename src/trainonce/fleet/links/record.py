"""What one host measured, as a file that others may read without trusting it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from trainonce.fleet.records import Record, address, count

MAX_HOPS = 32
MAX_PACKETS = 100_000

# A peer's address and the index of the port pair that both ends use.
FlowKey = tuple[str, int]


@dataclass(kw_only=True)
class HostRecord(Record):
    """What one host sent, learned and received.

    Args:
        host: Its address.
        stamps: "kernel" or "user": where arrival times were taken.
        hops: Address of each router on the way to a peer and at last the peer; None where a
            router did not answer. Without the peer where it did not answer, and with nothing where
            nobody did.
        sent: Probes sent on each flow.
        received: For each probe that arrived from a peer, when it was sent on the peer's clock and
            how long it took as the difference of the two clocks, in nanoseconds and in the order
            of arrival.
        unreachable: Peers that never answered.
        strangers: Packets that were not from a peer, or not authentic.
    """

    FORMAT = "trainonce-links-1"
    COMMAND = "trainonce fleet probe"
    MAX_FILE_BYTES = 256 << 20

    host: str
    stamps: str = "user"
    hops: dict[FlowKey, list[str | None]] = field(default_factory=lambda: {})
    sent: dict[FlowKey, int] = field(default_factory=lambda: {})
    received: dict[FlowKey, list[tuple[int, int]]] = field(default_factory=lambda: {})
    unreachable: list[str] = field(default_factory=lambda: [])
    strangers: int = 0

    def _to_raw(self) -> dict[str, Any]:
        flows = {"hops": self.hops, "sent": self.sent, "received": self.received}
        return {
            **vars(self),
            **{name: [[*key, told] for key, told in each.items()] for name, each in flows.items()},
        }

    @classmethod
    def _from_raw(cls, raw: Any) -> Self:
        return cls(
            host=address(raw["host"]),
            stamps=raw["stamps"],
            hops={_key(row): _hops(row[2]) for row in raw["hops"]},
            sent={_key(row): count(row[2], most=MAX_PACKETS) for row in raw["sent"]},
            received={_key(row): _arrivals(row[2]) for row in raw["received"]},
            unreachable=[address(peer) for peer in raw["unreachable"]],
            strangers=count(raw["strangers"]),
        )


def _key(row: Any) -> FlowKey:
    peer, port, _ = row
    if type(port) is not int or not 0 <= port < 65_536:
        raise ValueError(f"port {port!r}")
    return address(peer), port


def _hops(value: Any) -> list[str | None]:
    if not isinstance(value, list) or len(value) > MAX_HOPS:
        raise ValueError("hops that are no short list")
    return [None if hop is None else address(hop) for hop in value]


def _arrivals(value: Any) -> list[tuple[int, int]]:
    if not isinstance(value, list) or len(value) > MAX_PACKETS:
        raise ValueError("arrivals that are no list")
    for sent_ns, delay_ns in value:
        if type(sent_ns) is not int or type(delay_ns) is not int:
            raise ValueError(f"an arrival {[sent_ns, delay_ns]}")
        if not 0 <= sent_ns < 1 << 62 or abs(delay_ns) > 1 << 62:
            raise ValueError(f"an arrival {[sent_ns, delay_ns]}")
    return [(sent_ns, delay_ns) for sent_ns, delay_ns in value]
