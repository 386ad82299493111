"""What one host measured, as a file that others may read without trusting it."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = "trainonce-links-1"
MAX_FILE_BYTES = 256 << 20
MAX_HOPS = 32
MAX_PACKETS = 100_000

# A peer's address and the index of the port pair that both ends use.
FlowKey = tuple[str, int]


@dataclass(kw_only=True)
class HostRecord:
    """What one host sent, learned and received.

    Args:
        host: Its address.
        stamps: "kernel" or "user": where arrival times were taken.
        hops: Address of each router on the way to a peer and at last the peer; None where a
            router did not answer. Empty where the way is not known.
        sent: Probes sent on each flow.
        received: For each probe that arrived from a peer, when it was sent on the peer's clock and
            how long it took as the difference of the two clocks, in nanoseconds and in the order
            of arrival.
        unreachable: Peers that never answered.
        strangers: Packets that were not from a peer, or not authentic.
    """

    host: str
    stamps: str = "user"
    hops: dict[FlowKey, list[str | None]] = field(default_factory=lambda: {})
    sent: dict[FlowKey, int] = field(default_factory=lambda: {})
    received: dict[FlowKey, list[tuple[int, int]]] = field(default_factory=lambda: {})
    unreachable: list[str] = field(default_factory=lambda: [])
    strangers: int = 0

    def write(self, path: Path) -> None:
        """Write the record as JSON.

        Raises:
            ConfigError: The file cannot be written.
        """
        record = {
            "format": _FORMAT,
            "host": self.host,
            "stamps": self.stamps,
            "hops": [[*key, hops] for key, hops in self.hops.items()],
            "sent": [[*key, sent] for key, sent in self.sent.items()],
            "received": [[*key, rows] for key, rows in self.received.items()],
            "unreachable": self.unreachable,
            "strangers": self.strangers,
        }
        try:
            path.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> HostRecord:
        """Read a record and check every value in it.

        Raises:
            ConfigError: The file cannot be read, or holds anything but a record.
        """
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ConfigError(f"{path} is larger than a record may be")
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        try:
            return cls._from_raw(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} is not a record of `trainonce fleet probe`: {error}",
                hint="pass the files that its --out wrote, one of each host",
            ) from error

    @classmethod
    def _from_raw(cls, raw: Any) -> HostRecord:
        if raw["format"] != _FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, not {_FORMAT!r}")
        if raw["stamps"] not in ("kernel", "user"):
            raise ValueError(f"unknown stamps {raw['stamps']!r}")
        return cls(
            host=_address(raw["host"]),
            stamps=raw["stamps"],
            hops={_key(row): _hops(row[2]) for row in raw["hops"]},
            sent={_key(row): _count(row[2]) for row in raw["sent"]},
            received={_key(row): _arrivals(row[2]) for row in raw["received"]},
            unreachable=[_address(peer) for peer in raw["unreachable"]],
            strangers=int(raw["strangers"]),
        )


def _address(value: Any) -> str:
    return str(ipaddress.IPv4Address(str(value)))


def _key(row: Any) -> FlowKey:
    peer, port, _ = row
    if not isinstance(port, int) or not 0 <= port < 65_536:
        raise ValueError(f"port {port!r}")
    return _address(peer), port


def _hops(value: Any) -> list[str | None]:
    if not isinstance(value, list) or len(value) > MAX_HOPS:
        raise ValueError("hops that are no short list")
    return [None if hop is None else _address(hop) for hop in value]


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_PACKETS:
        raise ValueError(f"a number of packets {value!r}")
    return value


def _arrivals(value: Any) -> list[tuple[int, int]]:
    if not isinstance(value, list) or len(value) > MAX_PACKETS:
        raise ValueError("arrivals that are no list")
    for sent_ns, delay_ns in value:
        if type(sent_ns) is not int or type(delay_ns) is not int:
            raise ValueError(f"an arrival {[sent_ns, delay_ns]}")
        if not 0 <= sent_ns < 1 << 62 or abs(delay_ns) > 1 << 62:
            raise ValueError(f"an arrival {[sent_ns, delay_ns]}")
    return [(sent_ns, delay_ns) for sent_ns, delay_ns in value]
