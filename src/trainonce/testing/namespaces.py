"""A laboratory of Linux network namespaces: real kernels, real queues, no hardware.

Needs `ip` (iproute2) and the right to make namespaces; `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def why_not() -> str | None:
    """Return why no namespaces can be made here, None where they can."""
    if not shutil.which("ip"):
        return "`ip` (iproute2) is not installed"
    probe = f"to{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=True)
    return None


class NetworkLab:
    """Namespaces joined by cables, all removed at the end.

    Args:
        prefix: Of the namespaces' names; the process id is added.
    """

    def __init__(self, prefix: str = "to") -> None:
        self._prefix = f"{prefix}{os.getpid()}"
        self._nodes: dict[str, str] = {}
        self._children: list[subprocess.Popen[str]] = []

    def __enter__(self) -> NetworkLab:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            with child:  # closes its pipes and waits
                child.kill()
        for full in self._nodes.values():
            with contextlib.suppress(ConfigError):
                _ip(["netns", "delete", full])

    def add_node(self, name: str, *, forwards: bool = False) -> None:
        """Make a namespace. One that forwards is a router with ECMP over ports."""
        full = f"{self._prefix}{name}"
        _ip(["netns", "add", full])
        self._nodes[name] = full
        _ip(["-n", full, "link", "set", "lo", "up"])
        if forwards:
            self.set_kernel(
                name,
                {
                    "net.ipv4.ip_forward": "1",
                    "net.ipv4.fib_multipath_hash_policy": "1",
                    "net.ipv4.icmp_ratelimit": "0",
                    "net.ipv4.icmp_msgs_per_sec": "100000",
                    "net.ipv4.icmp_msgs_burst": "10000",
                },
            )

    def cable(self, one: str, address_one: str, other: str, address_other: str) -> None:
        """Join two nodes by a pair of interfaces, each named after the node at the other end.

        Args:
            one: A node.
            address_one: Its end's address, with the prefix length: "10.0.0.1/30".
            other: Another node.
            address_other: That one's.
        """
        a, b = self._nodes[one], self._nodes[other]
        peer = ["peer", "name", one, "netns", b]
        _ip(["link", "add", other, "netns", a, "type", "veth", *peer])
        for full, name, address in ((a, other, address_one), (b, one, address_other)):
            _ip(["-n", full, "addr", "add", address, "dev", name])
            _ip(["-n", full, "link", "set", name, "up"])

    def route(self, node: str, to: str, via: Sequence[str]) -> None:
        """Add a route, over several next hops at equal cost where there are several."""
        hops = [word for gateway in via for word in ("nexthop", "via", gateway)]
        _ip(["-n", self._nodes[node], "route", "add", to, *hops])

    def set_kernel(self, node: str, values: Mapping[str, str]) -> None:
        """Set kernel values of the node. One the kernel lacks is passed over."""
        script = 'for v in "$@"; do f=/proc/sys/$(echo "${v%%=*}" | tr . /); '
        script += '[ ! -e "$f" ] || echo "${v#*=}" > "$f"; done'
        items = [f"{name}={value}" for name, value in values.items()]
        self.run(node, ["sh", "-c", script, "sh", *items])

    def run(self, node: str, command: Sequence[str]) -> str:
        """Run a command in the node and return what it printed.

        Raises:
            ConfigError: It failed.
        """
        return _ip(["netns", "exec", self._nodes[node], *command])

    def run_together(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Run one command in each node at the same time, and wait for all of them.

        Raises:
            ConfigError: One of them failed.
        """
        children = {node: self.start(node, command) for node, command in commands.items()}
        for node, child in children.items():
            _, errors = child.communicate()
            if child.returncode:
                raise ConfigError(f"{' '.join(commands[node])} in {node}: {errors.strip()}")

    def start(self, node: str, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command in the node; it is killed at the end, if it still runs."""
        child = subprocess.Popen(
            ["ip", "netns", "exec", self._nodes[node], *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._children.append(child)
        return child


def _ip(arguments: Sequence[str]) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
