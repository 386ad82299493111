"""One worker as the launcher knows it."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainonce.controller.slots import Place

if TYPE_CHECKING:
    from trainonce.engines.base import ExitStatus, WorkerProcess
    from trainonce.wire.messages import Failed, FaultFiring, Message


@dataclass(frozen=True)
class Doom:
    """Why the launcher itself ended a worker; the words are those of an incident."""

    cause: str
    detail: str
    detected_by: str


@dataclass(frozen=True)
class Reserve:
    """A drained worker that stands at its commit until `rank` has a consistent successor."""

    rank: int
    handle: WorkerHandle


@dataclass(kw_only=True, eq=False)
class WorkerHandle:
    """One worker as the launcher knows it.

    `rank` is -1 while it holds none; `slot` is where it runs; `device` is the PCI address of its
    GPU, empty for none; `stacks_signals` make it write its stacks, empty for none.
    """

    worker: int
    process: WorkerProcess
    rank: int
    slot: int
    connected: bool = True
    watched: bool = True
    said_hello: bool = False
    parked: str = ""
    ready: bool = False
    failed: Failed | None = None
    firing: FaultFiring | None = None
    doom: Doom | None = None
    chaos: str = ""
    dismissed: bool = False
    fenced: bool = False
    ended: ExitStatus | None = None
    stopped_since_s: float | None = None
    promoted_s: float | None = None
    device: str = ""
    stacks_signals: list[int] = field(default_factory=lambda: [])

    @property
    def host(self) -> str:
        """Name of the host it runs on."""
        return self.process.host

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    @property
    def place(self) -> Place:
        """Where it runs."""
        return Place(host=self.host, slot=self.slot, device=self.device, worker=self.worker)

    @property
    def lives(self) -> bool:
        """Whether it takes up its slot."""
        return self.ended is None and not self.fenced

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send `message`. A worker that is gone will be noticed by its exit."""
        if self.connected:
            self.process.channel.try_send(message, fds)

    def kill(self) -> None:
        """Kill it and what it started, unless it has ended."""
        if self.ended is None:
            self.process.signal_group(signal.SIGKILL)
