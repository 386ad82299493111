"""The loop that every prober runs: meet the peers, send, and take what comes meanwhile."""

from __future__ import annotations

import contextlib
import ipaddress
import select
import socket
import time
from typing import TYPE_CHECKING, Any, Protocol, Self

from trainonce.errors import ConfigError
from trainonce.fleet.wire import PACKET_BYTES, Kind, Packet, Sealer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A Linux constant that the socket module does not name.
_MSG_ERRQUEUE = 0x2000
_HELLO_EVERY_S = 0.1
# Packets of a socket before the clock is looked at again: a flood of strangers holds up nobody.
_AT_ONCE = 256

# What comes beside a packet: level, kind and data of each piece.
Ancillary = list[tuple[int, int, bytes]]


class PeerSettings(Protocol):
    """What the settings of every prober hold."""

    @property
    def host(self) -> str:
        """This host's IPv4 address, as the peers see it."""
        ...

    @property
    def peers(self) -> tuple[str, ...]:
        """The other hosts' addresses."""
        ...

    @property
    def token(self) -> str:
        """The secret all hosts share; empty on loopback only."""
        ...

    @property
    def wait_s(self) -> float:
        """How long peers that do not answer are waited for."""
        ...


def check_settings(settings: PeerSettings, limits: Sequence[tuple[str, float, float]]) -> None:
    """Check addresses, and that each named setting lies within its limits.

    Raises:
        ConfigError: Something cannot be used.
    """
    for each in (settings.host, *settings.peers):
        try:
            ipaddress.IPv4Address(each)
        except ValueError as error:
            raise ConfigError(
                f"{each!r} is not an IPv4 address", hint="give addresses, not names"
            ) from error
    host, peers = settings.host, settings.peers
    if not peers or host in peers or len(set(peers)) < len(peers):
        raise ConfigError(f"the peers of {host} must be other hosts, each once: {peers}")
    for name, low, high in limits:
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} must lie between {low} and {high}, not {value}")


class Prober:
    """Sockets to a set of peers, and the loop over them. A subclass says what packets are for.

    Args:
        settings: Whom to probe, and with which secret.
        peers: Those of the peers to talk to.
        base_port: The first port, the same on all hosts.
        ports: How many of them.
    """

    option = "--port"

    def __init__(
        self, settings: PeerSettings, peers: Sequence[str], *, base_port: int, ports: int
    ) -> None:
        self._host = settings.host
        self._wait_s = settings.wait_s
        self._sealer = Sealer(settings.token)
        self._peers = set(peers)
        self._base_port = base_port
        self._ports = ports
        self._heard: set[str] = set()  # peers that were heard
        self._met: set[str] = set()  # peers that have heard us, too
        self._sockets: list[socket.socket] = []
        self._strangers = 0

    def __enter__(self) -> Self:
        try:
            for port in range(self._ports):
                self._sockets.append(self._bind(self._base_port + port))
        except OSError as error:
            self.__exit__()
            where = f"{self._base_port}" if self._ports == 1 else f"ports from {self._base_port}"
            raise ConfigError(
                f"cannot listen on {self._host}, {where}: {error.strerror}",
                hint=f"give this host's own address, and ports no one else uses ({self.option})",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()

    def _bind(self, port: int) -> socket.socket:
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            self._prepare(bound)
            bound.bind((self._host, port))
            bound.setblocking(False)
        except OSError:
            bound.close()
            raise
        return bound

    # -- what a subclass does

    def _prepare(self, bound: socket.socket) -> None:
        """Set the options of a socket before it is bound."""

    def _take(self, packet: Packet, peer: str, port: int, control: Ancillary, came_ns: int) -> None:
        """Take an authentic packet of a peer."""
        raise NotImplementedError

    def _take_error(self, data: bytes, port: int, control: Ancillary, target: Any) -> None:
        """Take what the kernel put on a socket's error queue."""
        raise NotImplementedError

    def _greet(self, kind: Kind) -> None:
        """Send a packet of `kind` to every peer."""
        raise NotImplementedError

    # -- the loop

    def meet(self) -> None:
        """Say hello until every peer has heard it, or the wait is over."""
        self._repeat_until(Kind.HELLO, lambda: self._met >= self._peers, self._wait_s)

    def _repeat_until(self, kind: Kind, over: Callable[[], bool], limit_s: float) -> None:
        end_s = time.monotonic() + limit_s
        while not over() and time.monotonic() < end_s:
            self._greet(kind)
            self._receive_until(over, _HELLO_EVERY_S)
        self._greet(kind)

    def _receive_for(self, limit_s: float) -> None:
        self._receive_until(lambda: False, limit_s)

    def _receive_until(self, over: Callable[[], bool], limit_s: float) -> None:
        end_s = time.monotonic() + limit_s
        while True:
            self._drain()
            left_s = end_s - time.monotonic()
            if left_s <= 0 or over():
                return
            select.select(self._sockets, [], [], left_s)

    def _drain(self) -> None:
        for port, bound in enumerate(self._sockets):
            for _ in range(_AT_ONCE):
                try:
                    data, control, _, source = bound.recvmsg(PACKET_BYTES + 1, 256)
                except BlockingIOError:
                    break
                except OSError:
                    continue  # a pending ICMP error: it is read from the error queue below
                self._accept(data, source[0], port, control, time.time_ns())
            with contextlib.suppress(OSError):  # empty
                while True:
                    data, control, _, target = bound.recvmsg(512, 512, _MSG_ERRQUEUE)
                    self._take_error(data, port, control, target)

    def _accept(self, data: bytes, peer: str, port: int, control: Ancillary, came_ns: int) -> None:
        packet = self._sealer.unpack(data, src=peer, dst=self._host)
        if packet is None or peer not in self._peers or not self._fits(packet, port):
            self._strangers += 1
            return
        self._heard.add(peer)
        if packet.kind is not Kind.HELLO or packet.seq:
            self._met.add(peer)  # only who has heard us goes on to other kinds
        self._take(packet, peer, port, control, came_ns)

    def _fits(self, packet: Packet, port: int) -> bool:
        """Tell whether a packet may have come to this port."""
        return True
