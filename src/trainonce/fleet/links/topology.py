"""The fabric as the paths show it: devices, the links between them, and the flows over them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from trainonce.errors import ConfigError
from trainonce.fleet.links.locate import Observations, with_switches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from numpy.typing import NDArray

    from trainonce.fleet.links.record import HostRecord

UNKNOWN = "?"


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
    device = _devices(records, names or {})
    flows: list[Flow] = []
    unknown_paths = 0
    for record in records:
        for key, sent in record.sent.items():
            peer, port = key
            if peer not in by_host or not sent:
                continue
            hops = record.hops.get(key)
            unknown_paths += hops is None
            rows = by_host[peer].received.get((record.host, port), [])
            arrived = np.array(rows, dtype=np.int64).reshape(-1, 2)
            flows.append(
                Flow(
                    src=device(record.host),
                    dst=device(peer),
                    port=port,
                    path=_path(record.host, hops or [None, peer], device),
                    sent=sent,
                    sent_ns=arrived[:, 0],
                    delays_ns=arrived[:, 1],
                )
            )
    fabric = Fabric(flows=flows, hosts=sorted(device(host) for host in by_host))
    fabric.notes += _notes(records, by_host, unknown_paths)
    return fabric


def _path(src: str, hops: Sequence[str | None], device: _Devices) -> tuple[str, ...]:
    """Name the devices of a path. Routers that did not answer become one unknown device.

    It is named by its neighbours, so that flows between the same two share it.
    """
    known = [device(src)]
    gap = False
    for hop in hops:
        if hop is None:
            gap = True
            continue
        if gap:
            known.append(f"{UNKNOWN}({known[-1]},{device(hop)})")
            gap = False
        if device(hop) != known[-1]:
            known.append(device(hop))
    return tuple(known)


class _Devices:
    """Address to device, as far as it is known."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._same: dict[str, str] = {}
        self._name_of: dict[str, str] = {}

    def __call__(self, address: str) -> str:
        if address in self._names:
            return self._names[address]
        root = self._find(address)
        return self._name_of.get(root, root)

    def name(self) -> None:
        """Let the name of one address hold for all that were joined with it."""
        for address, name in sorted(self._names.items()):
            self._name_of.setdefault(self._find(address), name)

    def _find(self, address: str) -> str:
        while address in self._same:
            address = self._same[address]
        return address

    def join(self, one: str, other: str) -> None:
        """Take two addresses for one device; the smaller one names it."""
        first, second = sorted((self._find(one), self._find(other)), key=ipaddress.IPv4Address)
        if first != second:
            self._same[second] = first


def _devices(records: Sequence[HostRecord], names: Mapping[str, str]) -> _Devices:
    """Find the interfaces of one router.

    A router answers with the address at which the packet came in. The other end of that
    point-to-point network belongs to the router before it, whose own answer named another
    interface: the two addresses are one device.
    """
    device = _Devices(names)
    hosts = {record.host for record in records} | {
        peer for record in records for peer, _ in record.sent
    }
    ways = [[record.host, *hops] for record in records for hops in record.hops.values()]
    seen = {address for way in ways for address in way if address is not None}
    steps = {(a, b) for way in ways for a, b in zip(way, way[1:], strict=False) if a and b}
    for before, address in sorted(steps):
        mate = _mate(address, seen - hosts if address in hosts else seen)
        if mate in seen and mate not in hosts and before not in hosts:
            device.join(before, mate)
    device.name()
    return device


def _mate(address: str, seen: Set[str]) -> str:
    """Return the other end of a point-to-point network.

    In a /30 the two middle addresses of four are used, and the outer ones are not addresses of
    hosts; where an outer one was seen, the four are two networks of /31.

    Args:
        address: One end.
        seen: Addresses that are in use, as far as is known.
    """
    number = int(ipaddress.IPv4Address(address))
    outer = {number & ~3, number | 3}
    is_30 = number not in outer and not seen & {str(ipaddress.IPv4Address(one)) for one in outer}
    return str(ipaddress.IPv4Address(number ^ (3 if is_30 else 1)))


def _notes(
    records: Sequence[HostRecord], by_host: Mapping[str, HostRecord], unknown_paths: int
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
    if unknown_paths:
        notes.append(
            f"{unknown_paths} flows have no known path (routers send no ICMP): "
            "they only tell which pairs of hosts are hit"
        )
    return notes
