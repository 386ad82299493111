"""Workers as processes of this host: the embedded default engine."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.engines.base import ExitStatus
from trainonce.engines.early_death import EarlyDeath
from trainonce.engines.guard import Guard
from trainonce.engines.template import Template
from trainonce.errors import ConfigError
from trainonce.wire.channel import Channel
from trainonce.wire.progress import Progress

if TYPE_CHECKING:
    from trainonce.engines.base import LaunchSpec

# A worker that does not read its messages must never hold up the launcher.
_SEND_TIMEOUT_S = 1


class LocalProcess:
    """A worker of this host: leader of its own session, watched through a pidfd.

    Args:
        pid: Its process id.
        parent: Who has to collect it: this process (a `Popen`), or a template.
        channel: The launcher's end of the control connection.
        progress: The page on which it says where it stands.
        guard: Ends it should the launcher be killed.
    """

    def __init__(
        self,
        pid: int,
        parent: subprocess.Popen[bytes] | Template,
        channel: Channel,
        progress: Progress,
        guard: Guard,
    ) -> None:
        self._pid = pid
        self._parent = parent
        self._guard = guard
        self._pidfd = os.pidfd_open(pid)
        self._early = EarlyDeath(pid)
        self._channel = channel
        self._progress = progress
        self._status: ExitStatus | None = None

    @property
    def pid(self) -> int:
        """Process id; also the id of its process group and session."""
        return self._pid

    @property
    def host(self) -> str:
        """Name of this host."""
        return socket.gethostname()

    @property
    def channel(self) -> Channel:
        """The launcher's end of the control connection."""
        return self._channel

    @property
    def progress(self) -> Progress:
        """The page on which the worker says where it stands."""
        return self._progress

    @property
    def exit_fd(self) -> int:
        """The pidfd: readable once the process has ended."""
        return self._pidfd

    @property
    def dying_fd(self) -> int:
        """Readable when a thread of the process has ended."""
        return self._early.fd

    def expect_death(self) -> None:
        """Watch the threads that the process has by now."""
        self._early.watch()

    def dying(self) -> ExitStatus | None:
        """Return how the process ends once all its threads are exiting; see `EarlyDeath`."""
        return self._early.look()

    def signal_group(self, signum: int) -> None:
        """Send `signum` to the whole process group; nothing happens once it was reaped."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signum)

    def signal_leader(self, signum: int) -> None:
        """Send `signum` to the worker; nothing happens once it was reaped."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signum)

    def reap(self) -> ExitStatus:
        """Kill the rest of the group, then collect the leader."""
        if self._status is None:
            # While the leader is not yet collected its id cannot be given to another process,
            # so this reaches exactly our group: loader children, mostly.
            self.signal_group(signal.SIGKILL)
            self._status = self._collect()
            self._guard.remove(self.pid)
        return self._status

    def _collect(self) -> ExitStatus:
        if isinstance(self._parent, Template):
            select.select([self._pidfd], [], [])  # its parent answers nobody else meanwhile
            return self._parent.reap(self._pid)
        info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        assert info is not None
        if info.si_code == os.CLD_EXITED:
            self._parent.returncode = info.si_status
            return ExitStatus(code=info.si_status)
        self._parent.returncode = -info.si_status
        return ExitStatus(signum=info.si_status)

    def trust(self) -> None:
        """Grant the worker time to end by itself should the launcher die."""
        self._guard.trust(self.pid)

    def is_stopped(self) -> bool:
        """Read the state of the process: "T" is stopped, "t" is traced by a debugger."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return False
        return stat.rpartition(b")")[2].split(maxsplit=1)[0] == b"T"

    def close(self) -> None:
        """Release connection, page and descriptors."""
        self._channel.close()
        self._progress.close()
        self._early.close()
        os.close(self._pidfd)


class LocalEngine:
    """Starts workers as processes of this host.

    Each is the leader of its own session, so that a signal to its group reaches the
    processes it started and a Ctrl-C at the terminal reaches only the launcher. A guard
    process ends them should the launcher be killed.

    Args:
        grace_s: After the death of the launcher, how long workers that speak our protocol
            may take to finish their step and write a checkpoint.
    """

    def __init__(self, *, grace_s: float = 120.0) -> None:
        self._guard = Guard(grace_s=grace_s)
        self._template: Template | None = None

    @property
    def host(self) -> str:
        """Name of this host."""
        return socket.gethostname()

    def start(self, spec: LaunchSpec) -> LocalProcess:
        """Start one worker and return at once.

        Raises:
            ConfigError: The program cannot be started, or an output file cannot be opened.
        """
        self._guard.ensure()
        channel, theirs = Channel.pair()
        _limit_sending(channel)
        progress, progress_fd = Progress.create()
        try:
            with contextlib.ExitStack() as files:
                outputs = {
                    number: files.enter_context(path.open("ab")).fileno()
                    for number, path in ((1, spec.stdout), (2, spec.stderr))
                    if path is not None
                }
                fds = (theirs.fileno(), progress_fd)
                pid, parent = self._fork(spec, fds, outputs) or self._spawn(spec, fds, outputs)
        except OSError as error:
            channel.close()
            progress.close()
            raise ConfigError(
                f"cannot start {spec.command[0]!r}: {error}",
                hint="check that the program exists and can be executed",
            ) from error
        finally:
            theirs.close()
            os.close(progress_fd)
        process = LocalProcess(pid, parent, channel, progress, self._guard)
        self._guard.add(pid)
        return process

    def _fork(
        self, spec: LaunchSpec, fds: tuple[int, int], outputs: dict[int, int]
    ) -> tuple[int, Template] | None:
        template = self._template
        if template is None or not template.ready or template.command != spec.command:
            return None
        pid = template.fork(spec.env, fds, outputs)
        return None if pid is None else (pid, template)

    def _spawn(
        self, spec: LaunchSpec, fds: tuple[int, int], outputs: dict[int, int]
    ) -> tuple[int, subprocess.Popen[bytes]]:
        control, progress = fds
        popen = subprocess.Popen(
            spec.command,
            env={
                **spec.env,
                settings.CONTROL_FD.name: str(control),
                settings.PROGRESS_FD.name: str(progress),
            },
            stdin=subprocess.DEVNULL,
            stdout=outputs.get(1),
            stderr=outputs.get(2),
            start_new_session=True,
            pass_fds=fds,
        )
        return popen.pid, popen

    def preload(self, spec: LaunchSpec) -> None:
        """Make ready to start workers like `spec` by a fork, if that is possible."""
        if self._template is None and Template.can_run(spec.command):
            with contextlib.suppress(OSError):
                self._template = Template(spec.command, spec.env)

    @property
    def preparing(self) -> bool:
        """Whether a start would be faster a little later."""
        if self._template is None:
            return False
        self._template.poll()
        return self._template.alive and not self._template.ready

    def maintain(self) -> None:
        """Start the guard again if somebody killed it."""
        self._guard.ensure()

    def close(self) -> None:
        """Dismiss the guard and the template."""
        if self._template is not None:
            self._template.close()
        self._guard.close()


def _limit_sending(channel: Channel) -> None:
    with socket.socket(fileno=os.dup(channel.fileno())) as same:
        same.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0)
        )
