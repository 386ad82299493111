"""A small leaf-spine fabric of network namespaces, with links that can be made to lose packets."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from trainonce.fleet.clocks.record import ClockRecord
from trainonce.fleet.links.record import HostRecord
from trainonce.testing.namespaces import NetworkLab, why_not

if TYPE_CHECKING:
    from pathlib import Path

_TABLE = "trainonce_faults"
_TOKEN = "only for this laboratory"
# Six megabits a second over sixteen ports, so that every equal-cost path takes its share.
_FLOOD = """
import socket, sys, time
senders = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(16)]
while True:
    for sender in senders:
        try:
            sender.sendto(bytes(1000), (sys.argv[1], 9999))
        except OSError:
            pass
    time.sleep(16 * 8000 / 6e6)
"""


def why_no_faults() -> str | None:
    """Return why no lossy fabric can be made here, None where one can."""
    if reason := why_not():
        return reason
    return None if shutil.which("nft") else "`nft` (nftables), which drops packets, is missing"


class Clos:
    """Two spines, three leaves, six hosts; ECMP over addresses and ports.

    Args:
        lab: Where the namespaces are made.
    """

    def __init__(self, lab: NetworkLab) -> None:
        self._lab = lab
        self.hosts = {f"host{h}": f"10.61.{h}.2" for h in range(1, 7)}
        self.names = {address: host for host, address in self.hosts.items()}
        for s in (1, 2):
            lab.add_node(f"spine{s}", forwards=True)
        for leaf in (1, 2, 3):
            self._add_leaf(leaf)
        pairs = [(f"leaf{leaf}", f"spine{s}") for leaf in (1, 2, 3) for s in (1, 2)]
        pairs += [(f"host{h}", f"leaf{(h + 1) // 2}") for h in range(1, 7)]
        self.links = sorted(f"{a}->{b}" for pair in pairs for a, b in (pair, pair[::-1]))

    def _add_leaf(self, leaf: int) -> None:
        lab, name = self._lab, f"leaf{leaf}"
        lab.add_node(name, forwards=True)
        up = {s: (f"10.60.{leaf * 10 + s}.1", f"10.60.{leaf * 10 + s}.2") for s in (1, 2)}
        for s, (below, above) in up.items():
            lab.cable(name, f"{below}/30", f"spine{s}", f"{above}/30")
            self.names |= {below: name, above: f"spine{s}"}
        lab.route(name, "default", [above for _, above in up.values()])
        for h in (2 * leaf - 1, 2 * leaf):
            host, gateway = f"host{h}", f"10.61.{h}.1"
            lab.add_node(host)
            lab.cable(host, f"{self.hosts[host]}/30", name, f"{gateway}/30")
            lab.route(host, "default", [gateway])
            self.names[gateway] = name
            for s, (below, _) in up.items():
                lab.route(f"spine{s}", f"10.61.{h}.0/30", [below])

    def lose(self, link: str, per_mille: int) -> None:
        """Let `link` ("leaf1->spine2") lose that many of a thousand probes, at random."""
        node, _, towards = link.partition("->")
        some = f"numgen random mod 1000 < {per_mille} " if per_mille < 1000 else ""
        rules = [
            f"add table ip {_TABLE}",
            f"add chain ip {_TABLE} c {{ type filter hook postrouting priority 0; }}",
            (f"add rule ip {_TABLE} c oifname {towards} udp dport 47800-48055 {some}drop"),
        ]
        self._lab.run(node, ["nft", "; ".join(rules)])

    def heal(self, link: str) -> None:
        """Undo `lose`."""
        self._lab.run(link.partition("->")[0], ["nft", "delete", "table", "ip", _TABLE])

    def congest(self, link: str, source: str, target: str) -> None:
        """Let `source` send more to `target` than `link` now takes: what goes over it is late.

        The other links stay as fast as they are. It lasts until the laboratory ends.
        """
        node, _, towards = link.partition("->")
        shape = ["root", "tbf", "rate", "2mbit", "burst", "3kb", "latency", "20ms"]
        self._lab.run(node, ["tc", "qdisc", "add", "dev", towards, *shape])
        self._lab.start(source, [sys.executable, "-c", _FLOOD, self.hosts[target]])

    def probe(self, folder: Path, *options: str) -> list[HostRecord]:
        """Let all hosts run `trainonce fleet probe` at once; return their records."""
        return [HostRecord.read(path) for path in self._measure("probe", folder, options)]

    def probe_clocks(self, folder: Path, *options: str) -> list[ClockRecord]:
        """Let all hosts run `trainonce fleet clock-probe` at once; return their records."""
        return [ClockRecord.read(path) for path in self._measure("clock-probe", folder, options)]

    def _measure(self, what: str, folder: Path, options: tuple[str, ...]) -> list[Path]:
        token = folder / "token"
        token.write_text(_TOKEN)
        self._lab.run_together(
            {
                host: [
                    *(sys.executable, "-m", "trainonce.cli.main", "fleet", what),
                    *("--host", address, "--token-file", str(token), "--wait-s", "60", "--peers"),
                    ",".join(peer for peer in self.hosts.values() if peer != address),
                    *("--out", str(folder / f"{what}-{host}.json"), *options),
                ]
                for host, address in self.hosts.items()
            }
        )
        return [folder / f"{what}-{host}.json" for host in self.hosts]
