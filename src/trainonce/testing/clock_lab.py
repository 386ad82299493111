"""Hosts in namespaces behind one switch, with bursty load and clocks that are wrong in software.

All namespaces share the machine's clock, so that the truth is known: offsets and skews are added to
what was stamped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainonce.fleet.clocks.record import ClockRecord

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.fleet.clocks.sync import ClockReport
    from trainonce.testing.namespaces import NetworkLab

_LINK_MBIT = 100
_TBF = ("root", "tbf", "rate", f"{_LINK_MBIT}mbit", "burst", "12kb", "latency", "50ms")

# Bursts of 0.3 s on average, as collectives make them, at 1.1 times what the link takes: its queue
# builds up in each, and empties in the pause after it. Sent by a schedule, so that a busy machine
# does not lighten the load, and with a send buffer that does not hold the bursts back.
_BURSTS = """
import random, socket, sys, time
address, share, link = (sys.argv[1], 9999), float(sys.argv[2]), float(sys.argv[3])
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setsockopt(socket.SOL_SOCKET, 32, 16 << 20)  # SO_SNDBUFFORCE
gap_s = 8928 * 8 / (1.1 * link)
next_s = time.monotonic()
while True:
    burst_s = min(random.expovariate(3), 1.0)
    end_s = next_s + burst_s
    while next_s < end_s:
        try:
            sender.sendto(bytes(8900), address)
        except OSError:
            pass
        next_s += gap_s
        if next_s > time.monotonic() + 0.001:
            time.sleep(next_s - time.monotonic())
    next_s += burst_s * (1.1 / share - 1)
    time.sleep(max(0, next_s - time.monotonic()))
"""


@dataclass(frozen=True)
class WrongClock:
    """A clock that is `offset_s` off at the start and gains `skew` seconds a second."""

    offset_s: float
    skew: float

    def reading_ns(self, true_ns: int, start_ns: int) -> int:
        """Return what it shows."""
        return true_ns + round(self.offset_s * 1e9 + self.skew * (true_ns - start_ns))

    def true_s(self, reading_s: float) -> float:
        """Return the time since the start at which it shows the start plus `reading_s`."""
        return (reading_s - self.offset_s) / (1 + self.skew)

    def offset_at(self, true_s: float) -> float:
        """Return how far it is off `true_s` seconds after the start."""
        return self.offset_s + self.skew * true_s


class ClockLab:
    """Hosts around a switch, each link of 100 Mbit/s.

    Args:
        lab: Where the namespaces are made.
        num_hosts: How many hosts.
    """

    def __init__(self, lab: NetworkLab, num_hosts: int = 4) -> None:
        self._lab = lab
        self.hosts = [f"10.55.{i}.2" for i in range(1, num_hosts + 1)]
        lab.add_node("switch", forwards=True)
        for i, address in enumerate(self.hosts, start=1):
            node, gateway = f"host{i}", f"10.55.{i}.1"
            lab.add_node(node)
            lab.cable(node, f"{address}/30", "switch", f"{gateway}/30")
            lab.route(node, "default", [gateway])
            for end, device in ((node, "switch"), ("switch", node)):
                # Large frames, as on GPU fabrics: few enough for a laptop to fill the link with.
                lab.run(end, ["ip", "link", "set", device, "mtu", "9000"])
                lab.run(end, ["tc", "qdisc", "add", "dev", device, *_TBF])

    def load(self, share: float) -> None:
        """Let every host send bursts to the next, `share` of a link on average, until the end."""
        for i in range(len(self.hosts)):
            target = self.hosts[(i + 1) % len(self.hosts)]
            command = [sys.executable, "-c", _BURSTS, target, str(share), str(_LINK_MBIT * 1e6)]
            self._lab.start(f"host{i + 1}", command)

    def probe(self, folder: Path, *options: str) -> list[ClockRecord]:
        """Let all hosts run `trainonce fleet clock-probe` at once; return their records."""
        token = folder / "token"
        token.write_text("only for this laboratory")
        self._lab.run_together(
            {
                f"host{i}": [
                    *(sys.executable, "-m", "trainonce.cli.main", "fleet", "clock-probe"),
                    *("--host", host, "--token-file", str(token), "--wait-s", "60", "--peers"),
                    ",".join(peer for peer in self.hosts if peer != host),
                    *("--out", str(folder / f"{host}.json"), *options),
                ]
                for i, host in enumerate(self.hosts, start=1)
            }
        )
        return [ClockRecord.read(folder / f"{host}.json") for host in self.hosts]


def start_ns(records: Sequence[ClockRecord]) -> int:
    """Return when the first probe left, on the true clock."""
    return min(stamp[2] for record in records for rows in record.sent.values() for stamp in rows)


def with_wrong_clocks(
    records: Sequence[ClockRecord], clocks: Sequence[WrongClock]
) -> list[ClockRecord]:
    """Return the records as hosts with these clocks would have stamped them."""
    begin_ns = start_ns(records)
    return [
        ClockRecord(
            host=record.host,
            stamps=record.stamps,
            sent={
                peer: [(p, w, clock.reading_ns(t, begin_ns)) for p, w, t in rows]
                for peer, rows in record.sent.items()
            },
            received={
                peer: [(p, w, clock.reading_ns(t, begin_ns)) for p, w, t in rows]
                for peer, rows in record.received.items()
            },
        )
        for record, clock in zip(records, clocks, strict=True)
    ]


def sync_errors_s(
    report: ClockReport, clocks: Mapping[str, WrongClock], begin_ns: int
) -> dict[str, NDArray[np.float64]]:
    """Return for each host but the reference the error of its offset in every window."""
    reference = clocks[report.reference]
    errors: dict[str, NDArray[np.float64]] = {}
    for host, found in report.clocks.items():
        if host != report.reference:
            times = [reference.true_s(when_s - begin_ns / 1e9) for when_s, _ in found.history]
            true = [clocks[host].offset_at(t) - reference.offset_at(t) for t in times]
            errors[host] = np.array([x for _, x in found.history]) - np.array(true)
    return errors


def ntp_errors_s(
    records: Sequence[ClockRecord], clocks: Sequence[WrongClock], best_of: int = 8
) -> NDArray[np.float64]:
    """Return the errors of the baseline: NTP's clock filter on the very same probes.

    Each probe there is taken with the next probe back; of every eight such samples the one with
    the shortest round trip gives the offset (RFC 5905, section 10).
    """
    begin_ns = start_ns(records)
    shown = with_wrong_clocks(records, clocks)
    errors: list[float] = []
    for i, a in enumerate(shown):
        for j, b in enumerate(shown[i + 1 :], start=i + 1):
            forth, back = _delays(a, b, begin_ns), _delays(b, a, begin_ns)
            if not len(forth) or not len(back):
                continue
            after = np.searchsorted(back[:, 1], forth[:, 0]).clip(max=len(back) - 1)
            round_trip = forth[:, 2] + back[after, 2]
            offset = (forth[:, 2] - back[after, 2]) / 2
            for k in range(0, len(forth) - best_of + 1, best_of):
                best = k + int(np.argmin(round_trip[k : k + best_of]))
                time_s = clocks[i].true_s(float(forth[best, 0]))
                true_s = clocks[j].offset_at(time_s) - clocks[i].offset_at(time_s)
                errors.append(float(offset[best]) - true_s)
    return np.array(errors)


def _delays(src: ClockRecord, dst: ClockRecord, begin_ns: int) -> NDArray[np.float64]:
    """[probes, 3]: sent on src's clock, received on dst's, and their difference; seconds."""
    came = {(p, w): t for p, w, t in dst.received.get(src.host, [])}
    rows = [
        (t - begin_ns, came[p, w] - begin_ns, came[p, w] - t)
        for p, w, t in src.sent.get(dst.host, [])
        if (p, w) in came
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 3) / 1e9
