"""The worker's end of the connection to the launcher."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.wire.channel import Channel
from trainonce.wire.messages import (
    Begin,
    Checkpoint,
    Committed,
    Drain,
    DumpCollectives,
    Exit,
    Generation,
    Hello,
    Message,
)
from trainonce.wire.progress import Progress
from trainonce.worker import evidence, imports

if TYPE_CHECKING:
    from collections.abc import Callable


class Listener(Protocol):
    """What a member of the job does when the launcher speaks; called on the link's thread."""

    def on_generation(
        self, message: Generation, mirror_fd: int | None, shadow_fd: int | None
    ) -> None:
        """A new membership."""
        ...

    def on_begin(self) -> None:
        """Go on with the step that this rank waits before."""
        ...

    def on_committed(self, message: Committed) -> None:
        """To spares: the job's progress."""
        ...

    def on_drain(self, message: Drain) -> None:
        """Stop at the next commit."""
        ...

    def on_checkpoint(self, message: Checkpoint) -> None:
        """Write a checkpoint at one of the next commits."""
        ...

    def on_exit(self) -> None:
        """All are done."""
        ...

    def on_launcher_lost(self) -> None:
        """The launcher is gone."""
        ...


class Link:
    """Connection to the launcher that started this process.

    Args:
        channel: Messages to and from it.
        progress: The page it reads.
        worker: Id of this worker.
        spare: Whether this worker has no rank yet.
    """

    def __init__(self, channel: Channel, progress: Progress, worker: int, *, spare: bool) -> None:
        self._channel = channel
        self.progress = progress
        self.worker = worker
        self.spare = spare

    @classmethod
    def inherited(cls) -> Link | None:
        """Return the connection this process was started with, or None.

        The variables are removed, so that programs this process starts do not inherit the
        role.
        """
        control = os.environ.pop(settings.CONTROL_FD.name, "")
        progress = os.environ.pop(settings.PROGRESS_FD.name, "")
        if not control or not progress:
            return None
        try:
            for fd in (int(control), int(progress)):
                os.set_inheritable(fd, False)
            return cls(
                Channel.from_fd(int(control)),
                Progress(int(progress)),
                int(os.environ[settings.WORKER.name]),
                spare=os.environ.get(settings.SPARE.name) == "1",
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the launcher's variables are set, but do not work: {error}",
                hint=f"unset {settings.CONTROL_FD.name}, or start with `trainonce run`",
            ) from error

    def start(self, listener: Listener, *, device: str = "") -> None:
        """Say hello and begin to listen; `device` is the PCI address of this process's GPU."""
        self.send(
            Hello(
                worker=self.worker,
                pid=os.getpid(),
                preloadable=imports.torch_saw_environment(),
                device=device,
                stacks_signals=list(evidence.write_stacks_at_signals()),
            )
        )
        threading.Thread(
            target=self._listen, args=(listener,), name="trainonce-link", daemon=True
        ).start()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send a message; nothing happens if the launcher is gone, the link's thread notices."""
        self._channel.try_send(message, fds)

    def _listen(self, listener: Listener) -> None:
        handlers: dict[type[Message], Callable[..., None]] = {
            Begin: lambda _: listener.on_begin(),
            Committed: listener.on_committed,
            Checkpoint: listener.on_checkpoint,
            Drain: listener.on_drain,
            Exit: lambda _: listener.on_exit(),
            DumpCollectives: lambda message: evidence.write_collectives(Path(message.path)),
        }
        while (message := self._channel.receive()) is not None:
            if isinstance(message, Generation):
                mirror = self._channel.take_fd() if message.mirrors else None
                shadow = self._channel.take_fd() if message.shadows else None
                listener.on_generation(message, mirror, shadow)
            elif type(message) in handlers:
                handlers[type(message)](message)
        listener.on_launcher_lost()
