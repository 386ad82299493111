"""The fabric as the paths show it: devices, the links between them, and the flows over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from trainonce.errors import ConfigError
from trainonce.fleet.links.locate import Observations, with_switches
from trainonce.fleet.links.paths import UNKNOWN, Ways, find_devices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trainonce.fleet.links.record import HostRecord


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One flow, put together from the records at both of its ends.

    Args:
        path: Devices from the source to the destination, both included.
        sent: Probes sent.
        sent_ns: [arrived], when each was sent, on the sender's clock.
        delays_ns: [arrived], receiver's clock less sender's.
    """

    src: str
    dst: str
    port: int
    path: tuple[str, ...]
    sent: int
    sent_ns: NDArray[np.int64]
    delays_ns: NDArray[np.int64]

    @property
    def lost(self) -> int:
        """Probes that did not arrive."""
        return max(0, self.sent - len(self.delays_ns))

    def links(self, *, directed: bool = True) -> list[str]:
        """Names of the links on the way."""
        pairs = zip(self.path[:-1], self.path[1:], strict=True)
        return [link_name(a, b, directed=directed) for a, b in pairs]


@dataclass(kw_only=True)
class Fabric:
    """Flows, and what had to be left out.

    Args:
        notes: What limits the answer, in words.
    """

    flows: list[Flow]
    hosts: list[str]
    notes: list[str] = field(default_factory=lambda: [])

    def devices(self) -> list[str]:
        """All devices on any path, sorted."""
        return sorted({device for flow in self.flows for device in flow.path})

    def observe(
        self,
        sent: NDArray[np.float64],
        bad: NDArray[np.float64],
        flow_links: Sequence[Sequence[str]],
    ) -> Observations:
        """Put flows into a matrix over links and switches.

        Args:
            sent: [flows] packets.
            bad: [flows] of those, lost or late.
            flow_links: For each flow the names of its links.
        """
        names = sorted({name for links in flow_links for name in links})
        column = {name: i for i, name in enumerate(names)}
        rows = np.repeat(np.arange(len(flow_links)), [len(links) for links in flow_links])
        cols = [column[name] for links in flow_links for name in links]
        shape = (len(flow_links), len(names))
        links = csr_matrix((np.ones(len(cols)), (rows, cols)), shape=shape)
        links.data[:] = 1.0
        at: dict[str, list[int]] = {}
        for name, index in column.items():
            for end in link_ends(name):
                if end not in self.hosts and not end.startswith(UNKNOWN):
                    at.setdefault(end, []).append(index)
        # A device of one link is that link, as far as probes can see.
        at = {device: members for device, members in sorted(at.items()) if len(members) > 1}
        return Observations(
            components=[*names, *at],
            num_links=len(names),
            members=list(at.values()),
            paths=with_switches(links, len(names), list(at.values())),
            sent=sent,
            bad=bad,
        )

    def loss(self) -> Observations:
        """Return what was lost, over directed links. Needs no clocks: both ends count."""
        return self.observe(
            np.array([flow.sent for flow in self.flows], dtype=np.float64),
            np.array([flow.lost for flow in self.flows], dtype=np.float64),
            [flow.links() for flow in self.flows],
        )


def link_name(a: str, b: str, *, directed: bool) -> str:
    """Return "a->b", or "a--b" where the direction is not known."""
    return f"{a}->{b}" if directed else "--".join(sorted((a, b)))


def link_ends(name: str) -> tuple[str, str]:
    """Return the two devices of a link."""
    a, _, b = name.partition("->" if "->" in name else "--")
    return a, b


def build_fabric(records: Sequence[HostRecord], names: Mapping[str, str] | None = None) -> Fabric:
    """Put the records of all hosts together.

    Args:
        records: One of each host.
        names: Device of an address, where it is known. Without it the interfaces of one router
            are found by the two ends of point-to-point networks (/30 and /31), and what is not
            found so stays a device of its own.

    Raises:
        ConfigError: Two records are of one host, or there are fewer than two.
    """
    by_host = {record.host: record for record in records}
    if len(by_host) < len(records) or len(records) < 2:
        raise ConfigError(
            f"{len(records)} records of {len(by_host)} hosts: one of each of two or more is needed",
            hint="run `trainonce fleet probe` on every host at the same time",
        )
    device = find_devices(records, names or {})
    ways = Ways(records, device)
    flows: list[Flow] = []
    for record in records:
        for key, sent in record.sent.items():
            peer, port = key
            if peer not in by_host or not sent:
                continue
            rows = by_host[peer].received.get((record.host, port), [])
            arrived = np.array(rows, dtype=np.int64).reshape(-1, 2)
            flows.append(
                Flow(
                    src=device(record.host),
                    dst=device(peer),
                    port=port,
                    path=ways.path(record, key),
                    sent=sent,
                    sent_ns=arrived[:, 0],
                    delays_ns=arrived[:, 1],
                )
            )
    fabric = Fabric(flows=flows, hosts=sorted(device(host) for host in by_host))
    fabric.notes += _notes(records, by_host, ways)
    return fabric


def _notes(
    records: Sequence[HostRecord], by_host: Mapping[str, HostRecord], ways: Ways
) -> list[str]:
    notes: list[str] = []
    missing = sorted({peer for r in records for peer, _ in r.sent} - set(by_host))
    if missing:
        notes.append(f"no record of {', '.join(missing)}: probes towards them do not count")
    for record in records:
        if record.unreachable:
            notes.append(f"{record.host} never heard {', '.join(record.unreachable)}")
        if record.strangers:
            notes.append(f"{record.host} dropped {record.strangers} packets of strangers")
    users = [record.host for record in records if record.stamps == "user"]
    if users:
        notes.append(
            f"arrivals were stamped in user space on {', '.join(users)}: a busy host may look like "
            "a slow link"
        )
    if ways.num_cut:
        notes.append(
            f"{ways.num_cut} flows are known up to the last router that answered: what it sends "
            "them to did not"
        )
    if ways.num_unknown:
        notes.append(
            f"{ways.num_unknown} flows have no known path (routers send no ICMP): "
            "they only tell which pairs of hosts are hit"
        )
    return notes
