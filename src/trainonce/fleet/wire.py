"""The probe packets: one format, authenticated, and nothing in them is trusted unchecked."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"TOP1"
_HEAD = struct.Struct("!4sBBHIQ")  # magic, kind, 0, port index, seq, sender's wall clock in ns
_MAC_BYTES = 16
PACKET_BYTES = _HEAD.size + _MAC_BYTES
MIN_TOKEN_CHARS = 16


class Kind(IntEnum):
    """What a packet is for."""

    HELLO = 1  # seq 1: the sender has heard the receiver
    TRACE = 2  # seq is the TTL it was sent with
    TRACED = 3  # the answer: that TTL reached the host
    PROBE = 4
    DONE = 5


@dataclass(frozen=True)
class Packet:
    """A packet that was authentic."""

    kind: Kind
    port: int
    seq: int
    sent_ns: int


class Sealer:
    """Packs and unpacks packets under a shared token.

    The keyed hash covers both addresses, so that a packet recorded between two hosts is worth
    nothing between two others.

    Args:
        token: Shared by all hosts. Empty: no secret, only allowed on loopback.
    """

    def __init__(self, token: str) -> None:
        self._key = hashlib.blake2b(token.encode(), digest_size=32).digest()

    def pack(self, packet: Packet, *, src: str, dst: str) -> bytes:
        """Return the bytes of `packet`, for the way from `src` to `dst`."""
        head = _HEAD.pack(_MAGIC, packet.kind, 0, packet.port, packet.seq, packet.sent_ns)
        return head + self._mac(head, src, dst)

    def unpack(self, data: bytes, *, src: str, dst: str) -> Packet | None:
        """Return the packet, or None where it is a stranger's."""
        if len(data) != PACKET_BYTES:
            return None
        head, mac = data[: _HEAD.size], data[_HEAD.size :]
        if not hmac.compare_digest(mac, self._mac(head, src, dst)):
            return None
        magic, kind, _, port, seq, sent_ns = _HEAD.unpack(head)
        if magic != _MAGIC or kind not in Kind.__members__.values():
            return None
        return Packet(Kind(kind), port, seq, sent_ns)

    def _mac(self, head: bytes, src: str, dst: str) -> bytes:
        ends = socket.inet_aton(src) + socket.inet_aton(dst)
        return hashlib.blake2b(head + ends, digest_size=_MAC_BYTES, key=self._key).digest()


def is_loopback(host: str) -> bool:
    """Tell whether `host`, an address or a name, is surely this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whoever resolves it decides
        return False


def read_token(path: Path | None, addresses: list[str]) -> str:
    """Return the token all hosts share.

    Args:
        path: Of the file that holds it; None is enough where all `addresses` are loopback.
        addresses: Of this host and its peers.

    Raises:
        ConfigError: A token is needed and there is none, or it is short, or cannot be read.
    """
    if path is None:
        beyond = [address for address in addresses if not is_loopback(address)]
        if beyond:
            raise ConfigError(
                f"probing {beyond[0]} is beyond loopback and needs a token",
                hint="write one secret of 16 characters or more to a file on each host, and "
                "pass --token-file",
            )
        return ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token in {path}: {error}") from error
    if len(token) < MIN_TOKEN_CHARS:
        raise ConfigError(
            f"the token in {path} has {len(token)} characters", hint="use at least 16"
        )
    return token
