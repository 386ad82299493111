# pyright: reportPrivateImportUsage=false
"""The inner process groups, which live for one generation and are then thrown away.

This is the seam for other transports: NCCL, and native reconfiguration from torch 2.14 on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A collective may wait as long as a peer computes; hangs are the controller's to judge.
_TIMEOUT = timedelta(days=7)
_LOOPBACK = "127.0.0.1"


def _socket_links() -> set[tuple[int, str]]:
    links: set[tuple[int, str]] = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                links.add((int(name), link))
    return links


class InnerGroup:
    """A gloo group over loopback that can be torn down while operations wait in it.

    gloo's own `abort` leaves operations blocked when a peer has vanished (torch 2.13), so
    the sockets that appeared while the group formed are noted, and shut down to end it.

    Args:
        rank: Rank within the group.
        size: Number of members.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._pg: Any = None
        self._store: Any = None
        self._before: set[tuple[int, str]] | None = None
        self._links: set[tuple[int, str]] = set()
        self._aborted = False

    @property
    def pg(self) -> Any:
        """The formed torch process group."""
        if self._pg is None:
            raise RuntimeError("the inner group has not formed")
        return self._pg

    def form(self, store_port: int, prefix: str) -> None:
        """Connect to the other members; blocks until all have come, or until `abort`.

        To be called once.

        Args:
            store_port: TCPStore on loopback.
            prefix: Scope of the keys; the same for all members, never used before.

        Raises:
            RuntimeError: A peer went away, or `abort` was called, before or meanwhile.
        """
        self._before = _socket_links()
        # A store client of its own: a wait on a shared one would block its other users.
        self._store = dist.TCPStore(_LOOPBACK, store_port, is_master=False, timeout=_TIMEOUT)
        # Later than this, `abort` finds a socket that ends the wait for the others.
        self._check()
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack what follows
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=_LOOPBACK)]
        options._timeout = _TIMEOUT
        scoped = dist.PrefixStore(prefix, self._store)
        self._pg = gloo(scoped, self.rank, self.size, options)
        self._links = _socket_links() - self._before
        self._check()

    def _check(self) -> None:
        """End a group that was aborted. Its sockets close; by now not all may be its own."""
        if self._aborted:
            self._let_go([])
            raise RuntimeError("the inner group was aborted while it formed")

    def abort(self, works: list[Any] | None = None) -> None:
        """End the group now: whatever waits in it fails. Safe to call at any time, twice.

        Args:
            works: What it was doing and nobody waits for, to be let go of with it; emptied.
        """
        self._aborted = True
        links = self._links
        if not links and self._before is not None:
            links = _socket_links() - self._before
        for fd, link in links:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{fd}") == link:
                    _shut_down(fd)
        self._let_go(works or [])

    def _let_go(self, works: list[Any]) -> None:
        # The destructor joins gloo's threads, about 10 ms: no reference may stay in this frame.
        references = [self._pg, self._store, *works]
        self._pg = self._store = None
        works.clear()
        threading.Thread(target=_drop, args=(references,), daemon=True).start()

    def send(self, data: torch.Tensor, rank: int, tag: int) -> None:
        """Send a contiguous tensor to `rank`; returns when it was taken."""
        self.pg.send([data], rank, tag).wait()

    def receive(self, out: torch.Tensor, rank: int, tag: int) -> None:
        """Receive into the contiguous tensor `out`."""
        self.pg.recv([out], rank, tag).wait()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return every rank's `data`, by rank. Collective over the group."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.pg.allgather([sizes], [torch.tensor([len(data)])]).wait()
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        self.pg.allgather([found], [padded]).wait()
        return [bytes(one[: int(size)].numpy()) for one, size in zip(found, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for every member. Collective over the group."""
        self.pg.allreduce([torch.zeros(1)]).wait()


def _shut_down(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        if sock.family != socket.AF_INET:
            return
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return  # the listening socket is gloo's to close
        if sock.getpeername()[0] == _LOOPBACK:
            sock.shutdown(socket.SHUT_RDWR)


def _drop(references: list[Any]) -> None:
    references.clear()
