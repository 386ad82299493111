"""Which devices a flow passes, by what a traceroute told: interfaces joined, gaps named."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from trainonce.fleet.links.record import FlowKey, HostRecord

UNKNOWN = "?"


class Ways:
    """The path of each flow, as far as it is known.

    Args:
        records: Of all hosts.
        device: Names the device of an address.
    """

    def __init__(self, records: Sequence[HostRecord], device: Devices) -> None:
        self._device = device
        self.num_unknown = 0
        self.num_cut = 0
        self._after: dict[str, set[str]] = {}
        self._before: dict[str, set[str]] = {}
        for record in records:
            for hops in record.hops.values():
                path = _path(record.host, hops, device)
                for one, other in zip(path, path[1:], strict=False):
                    self._after.setdefault(one, set()).add(other)
                    self._before.setdefault(other, set()).add(one)
        self._hosts = {device(record.host) for record in records}

    def path(self, record: HostRecord, key: FlowKey) -> tuple[str, ...]:
        """Return the devices from the host of `record` to the peer of the flow `key`."""
        peer, hops = key[0], record.hops.get(key)
        if not hops:
            self.num_unknown += 1
            return _path(record.host, [None, peer], self._device)
        path = _path(record.host, hops, self._device)
        if hops[-1] == peer:
            return path
        last, end = path[-1], self._device(peer)
        if end in self._after.get(last, ()):  # the answer was lost, and not the probe
            return (*path, end)
        self.num_cut += 1
        # A router that sends to the last one and is sent nothing by it, where all others are.
        silent = self._before.get(last, set()) - self._after.get(last, set()) - self._hosts
        silent = {name for name in silent if not name.startswith(UNKNOWN)}
        if len(silent) == 1:
            (other,) = silent
            return (*path, other, f"{UNKNOWN}({other},{end})", end)
        return (*path, f"{UNKNOWN}({last})", end)


def _path(src: str, hops: Sequence[str | None], device: Devices) -> tuple[str, ...]:
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


class Devices:
    """Address to device, as far as it is known."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._same: dict[str, str] = {}
        self._name_of: dict[str, str] = {}

    def __call__(self, address: str) -> str:
        """Return the device that has `address`."""
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


def find_devices(records: Sequence[HostRecord], names: Mapping[str, str]) -> Devices:
    """Find the interfaces of one router.

    A router answers with the address at which the packet came in. The other end of that
    point-to-point network belongs to the router before it, whose own answer named another
    interface: the two addresses are one device.
    """
    device = Devices(names)
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
