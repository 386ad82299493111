"""One host's part in measuring a fabric: learn the paths, send probes, count those of others.

Every host binds the same ports and sends from its i-th port to the peer's i-th port. So the flow
back is the peer's own i-th flow, and its path is known too. Paths are learned with the very
five-tuple that is probed, by a traceroute with `IP_RECVERR` that needs no privileges: packets with
rising TTL, whose ICMP answers arrive on the socket's error queue.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError
from trainonce.fleet.links.record import MAX_PACKETS, FlowKey, HostRecord
from trainonce.fleet.wire import PACKET_BYTES, Kind, Packet, Sealer

if TYPE_CHECKING:
    from collections.abc import Callable

# Linux constants that the socket module does not name.
_IP_RECVERR = 11
_MSG_ERRQUEUE = 0x2000
_SO_TIMESTAMPNS = 35
_SOCK_EXTENDED_ERR = struct.Struct("=IBBBBII")
_ORIGIN_ICMP = 2
_TIME_EXCEEDED = 11

_HELLO_EVERY_S = 0.1
_TRACE_TRIES = 3
_TRACE_WAIT_S = 0.25


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How one host measures.

    Args:
        host: This host's IPv4 address, as the peers see it.
        peers: The other hosts' addresses.
        token: The secret all hosts share; empty on loopback only.
        ports: Flows to each peer; more of them cover more of the paths that ECMP spreads over.
        base_port: The first port; the same on all hosts.
        packets: Probes on each flow.
        rate_per_s: Packets sent a second, at most.
        max_ttl: Longest path that is learned, in hops.
        wait_s: How long peers that do not answer are waited for.
    """

    host: str
    peers: tuple[str, ...]
    token: str = ""
    ports: int = 8
    base_port: int = 47_800
    packets: int = 100
    rate_per_s: float = 2000.0
    max_ttl: int = 8
    wait_s: float = 10.0

    def __post_init__(self) -> None:
        for address in (self.host, *self.peers):
            try:
                ipaddress.IPv4Address(address)
            except ValueError as error:
                raise ConfigError(
                    f"{address!r} is not an IPv4 address", hint="give addresses, not names"
                ) from error
        if not self.peers or self.host in self.peers or len(set(self.peers)) < len(self.peers):
            raise ConfigError(
                f"the peers of {self.host} must be other hosts, each once: {self.peers}"
            )
        for name, low, high in (
            ("ports", 1, 256),
            ("base_port", 1024, 65_535 - self.ports),
            ("packets", 1, MAX_PACKETS),
            ("rate_per_s", 1, 1_000_000),
            ("max_ttl", 1, 30),
            ("wait_s", 0, 3600),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"{name} must lie between {low} and {high}, not {getattr(self, name)}"
                )


def measure(settings: ProbeSettings) -> HostRecord:
    """Measure together with the peers, which do the same at the same time.

    Raises:
        ConfigError: The host's address or ports cannot be bound.
    """
    with _Prober(settings) as prober:
        prober.meet()
        prober.trace()
        prober.probe()
        prober.finish()
        return prober.record


class _Prober:
    def __init__(self, settings: ProbeSettings) -> None:
        self._settings = settings
        self._sealer = Sealer(settings.token)
        self._peers = set(settings.peers)
        self._heard: set[str] = set()  # peers that were heard
        self._met: set[str] = set()  # peers that have heard us, too
        self._done: set[str] = set()
        self._seen: dict[FlowKey, set[int]] = {}
        self._reached: dict[FlowKey, int] = {}  # smallest TTL that reached the peer
        self._routers: dict[tuple[str, int, int], str] = {}
        self._trace_ttl = 0
        self.record = HostRecord(host=settings.host, stamps="kernel")
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> _Prober:
        try:
            for port in range(self._settings.ports):
                self._sockets.append(self._bind(self._settings.base_port + port))
        except OSError as error:
            self.__exit__()
            raise ConfigError(
                f"cannot listen on {self._settings.host}, ports from {self._settings.base_port}: "
                f"{error.strerror}",
                hint="give this host's own address, and ports no one else uses (--base-port)",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()

    def _bind(self, port: int) -> socket.socket:
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            bound.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            try:
                bound.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            except OSError:
                self.record.stamps = "user"
            bound.bind((self._settings.host, port))
            bound.setblocking(False)
        except OSError:
            bound.close()
            raise
        return bound

    # -- phases

    def meet(self) -> None:
        """Say hello until every peer has heard it, or the wait is over."""
        self._repeat_until(Kind.HELLO, lambda: self._met >= self._peers, self._settings.wait_s)
        self.record.unreachable = sorted(self._peers - self._heard)

    def trace(self) -> None:
        """Learn the path of every flow, one TTL at a time, all flows at once."""
        flows = [(peer, i) for peer in sorted(self._heard) for i in range(self._settings.ports)]
        for ttl in range(1, self._settings.max_ttl + 1):
            self._trace_ttl = ttl
            for _ in range(_TRACE_TRIES):
                asked = [
                    flow
                    for flow in flows
                    if flow not in self._reached and (*flow, ttl) not in self._routers
                ]
                if not asked:
                    break
                for peer, port in asked:
                    self._send(Kind.TRACE, peer, port, ttl, ttl=ttl)
                    self._pace()
                self._receive_until(
                    lambda asked=asked, ttl=ttl: all(
                        flow in self._reached or (*flow, ttl) in self._routers for flow in asked
                    ),
                    _TRACE_WAIT_S,
                )
        self._trace_ttl = 0
        for flow in flows:
            if flow in self._reached:
                routers = [self._routers.get((*flow, t)) for t in range(1, self._reached[flow])]
                self.record.hops[flow] = [*routers, flow[0]]

    def probe(self) -> None:
        """Send the probes, spread evenly over flows and time."""
        peers = sorted(self._heard)
        for seq in range(self._settings.packets):
            for port in range(self._settings.ports):
                for peer in peers:
                    if self._send(Kind.PROBE, peer, port, seq):
                        key = (peer, port)
                        self.record.sent[key] = self.record.sent.get(key, 0) + 1
                    self._pace()

    def finish(self) -> None:
        """Go on receiving until every peer is done, and a moment longer for stragglers."""
        expected_s = self._settings.packets * self._settings.ports * len(self._peers)
        limit_s = self._settings.wait_s + 3 * expected_s / self._settings.rate_per_s
        self._repeat_until(Kind.DONE, lambda: self._done >= self._heard, limit_s)
        self._receive_until(lambda: False, 0.3)
        for _ in range(3):  # peers may still wait for us
            self._tell_all(Kind.DONE, 0)

    # -- sending

    def _send(self, kind: Kind, peer: str, port: int, seq: int, ttl: int | None = None) -> bool:
        """Send a packet; return whether it counts as sent."""
        packet = Packet(kind, port, seq, time.time_ns())
        data = self._sealer.pack(packet, src=self._settings.host, dst=peer)
        control = [(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", ttl))] if ttl else []
        address = (peer, self._settings.base_port + port)
        for _ in range(2):
            try:
                self._sockets[port].sendmsg([data], control, 0, address)
                return True
            except OSError as error:
                # The host's own firewall or a full queue: lost at the very first link. Any other
                # error is an ICMP answer to an earlier packet; this one was not tried yet.
                if error.errno in (errno.EPERM, errno.ENOBUFS):
                    return True
        return False

    def _tell_all(self, kind: Kind, seq: int | None = None) -> None:
        for peer in self._peers:
            known = int(peer in self._heard) if seq is None else seq
            for port in range(self._settings.ports):  # over every path: some may be broken
                self._send(kind, peer, port, known)

    def _pace(self) -> None:
        """Let the time of one packet pass, receiving meanwhile."""
        self._receive_until(lambda: False, 1 / self._settings.rate_per_s)

    def _repeat_until(self, kind: Kind, over: Callable[[], bool], limit_s: float) -> None:
        end_s = time.monotonic() + limit_s
        while not over() and time.monotonic() < end_s:
            self._tell_all(kind)
            self._receive_until(over, _HELLO_EVERY_S)
        self._tell_all(kind)

    # -- receiving

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
            while True:
                try:
                    data, control, _, source = bound.recvmsg(PACKET_BYTES + 1, 128)
                except BlockingIOError:
                    break
                except OSError:
                    continue  # a pending ICMP error: it is read from the error queue below
                self._take(port, data, control, source)
            with contextlib.suppress(OSError):  # empty
                while True:
                    _, control, _, target = bound.recvmsg(512, 512, _MSG_ERRQUEUE)
                    self._take_error(port, control, target[0])

    def _take(
        self, port: int, data: bytes, control: list[tuple[int, int, bytes]], source: tuple[str, int]
    ) -> None:
        peer = source[0]
        packet = self._sealer.unpack(data, src=peer, dst=self._settings.host)
        if packet is None or peer not in self._peers or packet.port != port:
            self.record.strangers += 1
            return
        key = (peer, port)
        self._heard.add(peer)
        if packet.kind is not Kind.HELLO or packet.seq:
            self._met.add(peer)  # only who has heard us goes on to other kinds
        if packet.kind is Kind.TRACE:
            self._send(Kind.TRACED, peer, port, packet.seq)
        elif packet.kind is Kind.TRACED:
            self._reached[key] = min(packet.seq, self._reached.get(key, packet.seq))
        elif packet.kind is Kind.DONE:
            self._done.add(peer)
        elif packet.kind is Kind.PROBE and packet.seq < MAX_PACKETS:
            seen = self._seen.setdefault(key, set())
            if packet.seq not in seen:
                seen.add(packet.seq)
                arrived_ns = _stamp_ns(control) or time.time_ns()
                rows = self.record.received.setdefault(key, [])
                rows.append((packet.sent_ns, arrived_ns - packet.sent_ns))

    def _take_error(self, port: int, control: list[tuple[int, int, bytes]], target: str) -> None:
        for level, kind, data in control:
            if level != socket.IPPROTO_IP or kind != _IP_RECVERR:
                continue
            fields = _SOCK_EXTENDED_ERR.unpack(data[: _SOCK_EXTENDED_ERR.size])
            if fields[1] == _ORIGIN_ICMP and fields[2] == _TIME_EXCEEDED and self._trace_ttl:
                router = socket.inet_ntoa(data[20:24])
                self._routers.setdefault((target, port, self._trace_ttl), router)


def _stamp_ns(control: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(data) >= 16:
            seconds, nanoseconds = struct.unpack("=qq", data[:16])
            return seconds * 10**9 + nanoseconds
    return None
