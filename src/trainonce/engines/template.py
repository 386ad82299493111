"""The launcher's side of the process from which workers are forked."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, Protocol

from trainonce.engines.base import ExitStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A command that the template can stand in for: our bootstrap of a script.
_BOOTSTRAP = ("-u", "-m", "trainonce.worker")
_TEMPLATE = ("-u", "-m", "trainonce.worker.template")
# Importing torch may take as long on a machine that swaps.
_IMPORT_S = 60.0
# Who waits for a fork is the launcher's loop.
_ANSWER_S = 5.0
_UNKNOWN = ExitStatus(code=-1)


class Process(Protocol):
    """What is needed of a `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None until `poll` or `wait` saw it."""
        ...

    def poll(self) -> int | None:
        """See whether it has ended, and return its `returncode`."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its `returncode`."""
        ...

    def kill(self) -> None:
        """Send SIGKILL."""
        ...


class Template:
    """Forks workers from a process that has torch imported.

    Importing takes a core each time a spare is started while the others train; a fork does
    not. If anything about it fails, workers are started the slow way.

    Args:
        command: What the workers run.
        env: The environment in which to import.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, command: tuple[str, ...], env: Mapping[str, str]) -> None:
        self.command = command
        self.ready = False
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._give_up_mono_s = time.monotonic() + _IMPORT_S
        with theirs:
            self._process = self._start(command[0], command[1 + len(_BOOTSTRAP) :], env, theirs)

    def _start(
        self, python: str, args: tuple[str, ...], env: Mapping[str, str], theirs: socket.socket
    ) -> Process:
        return subprocess.Popen(
            (python, *_TEMPLATE, str(theirs.fileno()), *args),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(theirs.fileno(),),
        )

    @staticmethod
    def can_run(command: tuple[str, ...]) -> bool:
        """Tell whether `command` is one that a template can stand in for."""
        return command[1:4] == _BOOTSTRAP

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs and answers."""
        return self._process.returncode is None

    def poll(self) -> None:
        """See whether it has become ready, or has died; returns at once."""
        if not self.alive or self.ready:
            return
        if self._process.poll() is not None:
            self.close()
        elif select.select([self._sock], [], [], 0)[0]:
            self.ready = bool(self._receive().get("ready"))
            if not self.ready:
                self.close()
        elif time.monotonic() > self._give_up_mono_s:
            self.close()

    def fork(
        self, env: Mapping[str, str], fds: Sequence[int], outputs: Mapping[int, int]
    ) -> int | None:
        """Fork a worker.

        Args:
            env: Its environment.
            fds: Its control connection and progress page.
            outputs: Descriptor to use for each of 1 and 2 that is not shared with the launcher.

        Returns:
            Its process id; None if that failed.
        """
        request = {"fork": {"env": dict(env), "outputs": list(outputs)}}
        pid = self._ask(request, [*fds, *outputs.values()]).get("pid")
        return pid if isinstance(pid, int) else None

    def reap(self, pid: int) -> ExitStatus:
        """Collect a worker that has ended; its status is unknown if the template is gone."""
        answer = self._ask({"reap": pid}, [])
        if "code" not in answer:
            return _UNKNOWN
        return ExitStatus(code=answer["code"], signum=answer["signum"])

    def close(self) -> None:
        """End it; what was forked lives on."""
        self.ready = False
        self._sock.close()
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if not self.alive:
            return {}
        with contextlib.suppress(OSError):
            socket.send_fds(self._sock, [json.dumps(request).encode()], fds)
            answer = self._receive()
            if answer:
                return answer
        self.close()
        return {}

    def _receive(self) -> dict[str, Any]:
        self._sock.settimeout(_ANSWER_S)
        try:
            return json.loads(self._sock.recv(4096) or b"{}")
        except (OSError, ValueError):
            return {}
