"""What one host stamped, as a file that others may read without trusting it."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = "trainonce-clocks-1"
MAX_FILE_BYTES = 512 << 20
_MAX_STAMPS = 20_000_000

# Pair, 0 or 1 within it, and when it was sent or arrived, in nanoseconds.
Stamp = tuple[int, int, int]


@dataclass(kw_only=True)
class ClockRecord:
    """What one host sent and received, on its own clock.

    Args:
        host: Its address.
        stamps: "kernel", or "user" where the kernel gave none.
        sent: For each peer, the probes sent.
        received: For each peer, the probes that arrived.
        unreachable: Peers that never answered.
        strangers: Packets that were not from a peer, or not authentic.
    """

    host: str
    stamps: str = "user"
    sent: dict[str, list[Stamp]] = field(default_factory=lambda: {})
    received: dict[str, list[Stamp]] = field(default_factory=lambda: {})
    unreachable: list[str] = field(default_factory=lambda: [])
    strangers: int = 0

    def write(self, path: Path) -> None:
        """Write the record as JSON.

        Raises:
            ConfigError: The file cannot be written.
        """
        record = {"format": _FORMAT, **self.__dict__}
        try:
            path.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> ClockRecord:
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
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a record of `trainonce fleet clock-probe`: {error}",
                hint="pass the files that its --out wrote, one of each host",
            ) from error

    @classmethod
    def _from_raw(cls, raw: Any) -> ClockRecord:
        if raw["format"] != _FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, not {_FORMAT!r}")
        if raw["stamps"] not in ("kernel", "user"):
            raise ValueError(f"unknown stamps {raw['stamps']!r}")
        return cls(
            host=_address(raw["host"]),
            stamps=raw["stamps"],
            sent={_address(peer): _stamps(each) for peer, each in raw["sent"].items()},
            received={_address(peer): _stamps(each) for peer, each in raw["received"].items()},
            unreachable=[_address(peer) for peer in raw["unreachable"]],
            strangers=int(raw["strangers"]),
        )


def _address(value: Any) -> str:
    return str(ipaddress.IPv4Address(str(value)))


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
