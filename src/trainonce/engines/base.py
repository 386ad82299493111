"""What the launcher needs of the place where workers run."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trainonce.wire.channel import Channel
    from trainonce.wire.progress import Progress


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """One worker to start.

    Args:
        worker: Its id, unique within the job and never reused.
        command: Program and arguments.
        env: Its whole environment, except for the descriptors that the engine adds.
        stdout: File that takes its standard output; None to share the launcher's.
        stderr: The same for standard error.
    """

    worker: int
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: {})
    stdout: Path | None = None
    stderr: Path | None = None


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended: by a signal, or with an exit code."""

    code: int = 0
    signum: int = 0

    def __str__(self) -> str:
        if not self.signum:
            return f"exit code {self.code}" if self.code >= 0 else "an unknown exit status"
        try:
            return signal.Signals(self.signum).name
        except ValueError:
            return f"signal {self.signum}"


class WorkerProcess(Protocol):
    """A started worker, as the launcher holds it."""

    @property
    def pid(self) -> int:
        """Its process id on its host."""
        ...

    @property
    def host(self) -> str:
        """Name of the host it runs on."""
        ...

    @property
    def channel(self) -> Channel:
        """The launcher's end of the control connection."""
        ...

    @property
    def progress(self) -> Progress:
        """The page on which the worker says where it stands."""
        ...

    @property
    def exit_fd(self) -> int:
        """Descriptor that turns readable once the process has ended."""
        ...

    @property
    def dying_fd(self) -> int:
        """Descriptor that turns readable when the worker may be about to end; see `dying`."""
        ...

    def expect_death(self) -> None:
        """Have `dying_fd` tell of an end early; called once the worker runs all it needs."""
        ...

    def dying(self) -> ExitStatus | None:
        """Return how the worker ends once none of its code runs any more, before it is gone.

        None where that is not known yet, or ever: then `exit_fd` tells.
        """
        ...

    def signal_group(self, signum: int) -> None:
        """Send `signum` to the worker and to the processes it started. No error if gone."""
        ...

    def signal_leader(self, signum: int) -> None:
        """Send `signum` to the worker alone. No error if gone."""
        ...

    def reap(self) -> ExitStatus:
        """Kill what is left of the worker's processes and collect its exit status.

        Blocks until the worker has ended: call it when `exit_fd` is readable.
        """
        ...

    def trust(self) -> None:
        """Note that the worker speaks our protocol: it ends by itself without a launcher."""
        ...

    def is_stopped(self) -> bool:
        """Tell whether the process was stopped by a signal; a traced one was not."""
        ...

    def close(self) -> None:
        """Release connection, page and descriptors. The process must have been reaped."""
        ...


class Engine(Protocol):
    """Starts workers. One implementation a kind of place."""

    @property
    def host(self) -> str:
        """Name of the host where workers run."""
        ...

    def start(self, spec: LaunchSpec) -> WorkerProcess:
        """Start one worker and return at once.

        Raises:
            ConfigError: The program cannot be started at all.
        """
        ...

    def preload(self, spec: LaunchSpec) -> None:
        """Prepare to start more workers like `spec` quickly, where the engine knows a way."""
        ...

    @property
    def preparing(self) -> bool:
        """Whether it does so now, so that a start that is not urgent had better wait."""
        ...

    def maintain(self) -> None:
        """Do what has to be done now and then; called a few times a second."""
        ...

    def close(self) -> None:
        """Release what the engine holds. All workers must have been reaped."""
        ...
