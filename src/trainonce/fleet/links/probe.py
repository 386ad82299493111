"""One host's part in measuring a fabric: learn the paths, send probes, count those of others.

Every host binds the same ports and sends from its i-th port to the peer's i-th port. So the flow
back is the peer's own i-th flow, and its path is known too. Paths are learned with the very
five-tuple that is probed, by a traceroute with `IP_RECVERR` that needs no privileges: packets with
rising TTL, whose ICMP answers arrive on the socket's error queue.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from trainonce.fleet.links.record import MAX_PACKETS, FlowKey, HostRecord
from trainonce.fleet.prober import Ancillary, Prober, check_settings
from trainonce.fleet.wire import Kind, Packet

# Linux constants that the socket module does not name.
_IP_RECVERR = 11
_SO_TIMESTAMPNS = 35
_SOCK_EXTENDED_ERR = struct.Struct("=IBBBBII")
_ORIGIN_ICMP = 2
_TIME_EXCEEDED = 11

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
        check_settings(
            self,
            (
                ("ports", 1, 256),
                ("base_port", 1024, 65_535 - self.ports),
                ("packets", 1, MAX_PACKETS),
                ("rate_per_s", 1, 1_000_000),
                ("max_ttl", 1, 30),
                ("wait_s", 0, 3600),
            ),
        )


def measure(settings: ProbeSettings) -> HostRecord:
    """Measure together with the peers, which do the same at the same time.

    Raises:
        ConfigError: The host's address or ports cannot be bound.
    """
    with _LinkProber(settings) as prober:
        prober.meet()
        prober.trace()
        prober.probe()
        prober.finish()
        return prober.record


class _LinkProber(Prober):
    option = "--base-port"

    def __init__(self, settings: ProbeSettings) -> None:
        super().__init__(
            settings, settings.peers, base_port=settings.base_port, ports=settings.ports
        )
        self._settings = settings
        self._done: set[str] = set()
        self._seen: dict[FlowKey, set[int]] = {}
        self._reached: dict[FlowKey, int] = {}  # smallest TTL that reached the peer
        self._routers: dict[tuple[str, int, int], str] = {}
        self._trace_ttl = 0
        self.record = HostRecord(host=settings.host, stamps="kernel")

    def _prepare(self, bound: socket.socket) -> None:
        bound.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        try:
            bound.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        except OSError:
            self.record.stamps = "user"

    # -- phases

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
            end = self._reached.get(flow, self._settings.max_ttl + 1)
            hops = [self._routers.get((*flow, ttl)) for ttl in range(1, end)]
            while flow not in self._reached and hops and hops[-1] is None:
                hops.pop()
            if flow in self._reached:
                hops.append(flow[0])
            if hops:
                self.record.hops[flow] = hops

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
        self._receive_for(0.3)
        for _ in range(3):  # peers may still wait for us
            self._greet(Kind.DONE)
        self.record.unreachable = sorted(self._peers - self._heard)
        self.record.strangers = self._strangers

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

    def _greet(self, kind: Kind) -> None:
        for peer in self._peers:
            known = int(peer in self._heard) if kind is Kind.HELLO else 0
            for port in range(self._settings.ports):  # over every path: some may be broken
                self._send(kind, peer, port, known)

    def _pace(self) -> None:
        """Let the time of one packet pass, receiving meanwhile."""
        self._receive_for(1 / self._settings.rate_per_s)

    # -- receiving

    def _fits(self, packet: Packet, port: int) -> bool:
        return packet.port == port

    def _take(self, packet: Packet, peer: str, port: int, control: Ancillary, came_ns: int) -> None:
        key = (peer, port)
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
                arrived_ns = _stamp_ns(control) or came_ns
                rows = self.record.received.setdefault(key, [])
                rows.append((packet.sent_ns, arrived_ns - packet.sent_ns))

    def _take_error(self, data: bytes, port: int, control: Ancillary, target: Any) -> None:
        for level, kind, told in control:
            if level != socket.IPPROTO_IP or kind != _IP_RECVERR:
                continue
            fields = _SOCK_EXTENDED_ERR.unpack(told[: _SOCK_EXTENDED_ERR.size])
            if fields[1] == _ORIGIN_ICMP and fields[2] == _TIME_EXCEEDED and self._trace_ttl:
                router = socket.inet_ntoa(told[20:24])
                self._routers.setdefault((target[0], port, self._trace_ttl), router)


def _stamp_ns(control: Ancillary) -> int | None:
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(data) >= 16:
            seconds, nanoseconds = struct.unpack("=qq", data[:16])
            return seconds * 10**9 + nanoseconds
    return None
