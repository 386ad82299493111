"""One host's part in comparing clocks: pairs of probes to its peers, stamped by the kernel.

A packet is stamped where it leaves to and comes from the driver (`SO_TIMESTAMPING`), which spares
it the scheduler. Where the kernel gives no stamps, those taken around the system calls are used,
and the record says so.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainonce.fleet.clocks.record import ClockRecord
from trainonce.fleet.prober import Ancillary, Prober, check_settings
from trainonce.fleet.wire import PACKET_BYTES, Kind, Packet

# Linux constants that the socket module does not name.
_SO_TIMESTAMPING = 37
_TX_SOFTWARE, _RX_SOFTWARE, _REPORT_SOFTWARE = 1 << 1, 1 << 3, 1 << 4
_TIMESPEC = struct.Struct("=qq")

_LINGER_S = 0.5
# Below this share of kernel stamps, a host's stamps are all taken from user space.
_MIN_COVERAGE = 0.9
MAX_NEIGHBOURS = 10

_Key = tuple[str, int, int]  # peer, pair, 0 or 1


@dataclass(frozen=True, kw_only=True)
class ClockProbeSettings:
    """How one host probes.

    Args:
        host: This host's IPv4 address, as the peers see it.
        peers: The other hosts' addresses. Of more than ten, the nearest ten by address are
            probed, those before and those after this host, so that neighbours are mutual.
        token: The secret all hosts share; empty on loopback only.
        port: The same on all hosts.
        duration_s: How long probes are sent.
        pairs_per_s: Pairs to each neighbour a second, at most.
        wait_s: How long peers that do not answer are waited for.
        kernel_stamps: False takes stamps in user space.
    """

    host: str
    peers: tuple[str, ...]
    token: str = ""
    port: int = 47_790
    duration_s: float = 20.0
    pairs_per_s: float = 100.0
    wait_s: float = 10.0
    kernel_stamps: bool = True

    def __post_init__(self) -> None:
        check_settings(
            self,
            (
                ("port", 1024, 65_535),
                ("duration_s", 0.1, 86_400),
                ("pairs_per_s", 1, 10_000),
                ("wait_s", 0, 3600),
            ),
        )

    def neighbours(self) -> list[str]:
        """Return the peers that are probed."""
        ring = sorted({self.host, *self.peers}, key=ipaddress.IPv4Address)
        at, reach = ring.index(self.host), MAX_NEIGHBOURS // 2
        if len(self.peers) <= MAX_NEIGHBOURS:
            return [peer for peer in ring if peer != self.host]
        near = [ring[(at + step) % len(ring)] for step in range(-reach, reach + 1) if step]
        return sorted(near, key=ipaddress.IPv4Address)


def probe_clocks(settings: ClockProbeSettings) -> ClockRecord:
    """Probe together with the peers, which do the same at the same time.

    Raises:
        ConfigError: The host's address or port cannot be bound.
    """
    with _ClockProber(settings) as prober:
        prober.meet()
        prober.probe()
        return prober.finish()


class _ClockProber(Prober):
    def __init__(self, settings: ClockProbeSettings) -> None:
        self._settings = settings
        self._neighbours = settings.neighbours()
        super().__init__(settings, self._neighbours, base_port=settings.port, ports=1)
        # When each probe left and came, by the kernel and by this process.
        self._left: dict[_Key, int] = {}
        self._left_user: dict[_Key, int] = {}
        self._came: dict[_Key, int] = {}
        self._came_user: dict[_Key, int] = {}

    def _prepare(self, bound: socket.socket) -> None:
        if self._settings.kernel_stamps:
            with contextlib.suppress(OSError):  # no stamps: user space takes them
                bound.setsockopt(
                    socket.SOL_SOCKET,
                    _SO_TIMESTAMPING,
                    _TX_SOFTWARE | _RX_SOFTWARE | _REPORT_SOFTWARE,
                )

    def probe(self) -> None:
        """Send pairs to one neighbour after the other, at uneven times so that no load hides."""
        rng = np.random.default_rng()
        gap_s = 1 / (self._settings.pairs_per_s * len(self._neighbours))
        end_s = time.monotonic() + self._settings.duration_s
        next_s, turn = time.monotonic(), 0
        while next_s < end_s:
            peer = self._neighbours[turn % len(self._neighbours)]
            if peer in self._heard:
                for which in (0, 1):
                    self._send(Kind.PROBE, peer, which, turn)
            turn += 1
            # A host that fell behind does not catch up in a burst: the rate is a limit.
            next_s = max(next_s, time.monotonic() - gap_s) + gap_s * rng.uniform(0.5, 1.5)
            self._receive_for(next_s - time.monotonic())

    def finish(self) -> ClockRecord:
        """Take what is still on its way, and choose the stamps."""
        self._receive_for(_LINGER_S)
        wanted = max(1, len(self._left_user)), max(1, len(self._came_user))
        coverage = min(len(self._left) / wanted[0], len(self._came) / wanted[1])
        kernel = coverage >= _MIN_COVERAGE
        record = ClockRecord(
            host=self._settings.host,
            stamps="kernel" if kernel else "user",
            unreachable=[peer for peer in self._neighbours if peer not in self._heard],
            strangers=self._strangers,
        )
        for stamps, table in (
            (self._left if kernel else self._left_user, record.sent),
            (self._came if kernel else self._came_user, record.received),
        ):
            for (peer, pair, which), time_ns in stamps.items():
                table.setdefault(peer, []).append((pair, which, time_ns))
        return record

    def _greet(self, kind: Kind) -> None:
        for peer in self._neighbours:
            self._send(kind, peer, 0, int(peer in self._heard))

    def _send(self, kind: Kind, peer: str, which: int, number: int) -> None:
        packet = Packet(kind, which, number, time.time_ns())
        data = self._sealer.pack(packet, src=self._settings.host, dst=peer)
        left_ns = time.time_ns()
        with contextlib.suppress(OSError):  # a full queue: this probe does not count
            self._sockets[0].sendto(data, (peer, self._settings.port))
            if kind is Kind.PROBE:
                self._left_user[peer, number, which] = left_ns

    def _take_error(self, data: bytes, port: int, control: Ancillary, target: Any) -> None:
        # The kernel hands back the frame it stamped; ours is the end of it.
        peer = self._peer_of(data, target)
        packet = self._sealer.unpack(data[-PACKET_BYTES:], src=self._host, dst=peer)
        stamp_ns = _kernel_stamp_ns(control)
        if packet and packet.kind is Kind.PROBE and stamp_ns:
            self._left.setdefault((peer, packet.seq, packet.port), stamp_ns)

    def _peer_of(self, frame: bytes, target: tuple[str, int] | None) -> str:
        """Return whom a frame of ours went to: the IP header before the payload says it."""
        header = frame[: len(frame) - PACKET_BYTES]
        if len(header) >= 28:  # IP and UDP headers, the destination in bytes 16 to 20
            return socket.inet_ntoa(header[-12:-8])
        return target[0] if target else "0.0.0.0"

    def _take(self, packet: Packet, peer: str, port: int, control: Ancillary, came_ns: int) -> None:
        if packet.kind is Kind.PROBE and packet.port in (0, 1):
            key = (peer, packet.seq, packet.port)
            self._came_user.setdefault(key, came_ns)
            if stamp_ns := _kernel_stamp_ns(control):
                self._came.setdefault(key, stamp_ns)


def _kernel_stamp_ns(control: Ancillary) -> int:
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPING and len(data) >= 16:
            seconds, nanoseconds = _TIMESPEC.unpack(data[:16])
            return seconds * 10**9 + nanoseconds
    return 0
