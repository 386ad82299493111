"""Jobs that start at once: launchers and workers forked from a process that has torch imported.

For tests. Importing torch takes a core for seconds, once for the launcher and once for each
rank; a fork takes milliseconds. The process that forks is `fork_server_process`.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ForkServer:
    """Forks launchers, from a process that is started for the first of them.

    A context manager: what was launched is to have ended before it does.

    Args:
        preload: Modules that scripts import, beside torch and trainonce.
        env: The environment in which to import; only what is read at imports matters.
    """

    def __init__(self, preload: Sequence[str], env: Mapping[str, str]) -> None:
        self._preload = preload
        self._env = dict(env)
        self._folder = tempfile.mkdtemp(prefix="trainonce-")  # of this user only
        self._address = os.path.join(self._folder, "socket")
        self._ends, self._lives = os.pipe()  # the process ends when we close it, or are killed
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lives)
        os.close(self._ends)
        if self._process is not None:
            self._process.wait()
        shutil.rmtree(self._folder)

    def launch(
        self, args: Sequence[str], env: Mapping[str, str], stdout: int, stderr: int
    ) -> ForkedProcess:
        """Fork a process that goes on as `trainonce args…`, in the present folder."""
        if self._process is None:
            self._process = self._start()
        request = {"launch": list(args), "env": dict(env), "cwd": os.getcwd()}
        return ForkedProcess(self._address, request, (stdout, stderr))

    def _start(self) -> subprocess.Popen[bytes]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._address)
            listener.listen()
            fds = (listener.fileno(), self._ends)
            return subprocess.Popen(
                [sys.executable, "-u", "-m", "trainonce.testing.fork_server_process",
                 *map(str, fds), self._address, *self._preload],
                env=self._env, stdin=subprocess.DEVNULL, pass_fds=fds,
            )  # fmt: skip


class ForkedProcess:
    """A process that a fork server has forked; used like a `subprocess.Popen`.

    Args:
        address: Of the server.
        request: What it is to be.
        fds: What it inherits.
    """

    def __init__(self, address: str, request: dict[str, Any], fds: Sequence[int]) -> None:
        self._address = address
        self.pid: int = ask(address, request, fds)["pid"]
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """See whether it has ended, and return its `returncode`."""
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self.returncode = int(ask(self._address, {"reap": self.pid})["returncode"])
            os.close(self._pidfd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its `returncode`.

        Raises:
            TimeoutExpired: It has not ended after `timeout` seconds.
        """
        if self.returncode is None:
            select.select([self._pidfd], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, sig)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def ask(address: str, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
    """Send one request to a fork server, and return its answer.

    Raises:
        RuntimeError: The server is gone.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address)
        socket.send_fds(sock, [json.dumps(request).encode()], fds)
        answer = sock.recv(4096)
    if not answer:
        raise RuntimeError("the fork server has ended")
    return json.loads(answer)


def name_of(home: str) -> str:
    """Return the name that processes of a job are given that are forked.

    /proc shows the environment with which a process was executed, so that of a forked one
    does not tell whose it is. The kernel keeps 15 bytes of a name, and forks inherit it.
    """
    return f"to-{hashlib.blake2b(home.encode(), digest_size=6).hexdigest()}"


def take_name(home: str) -> None:
    """Give this process the name of those of the job with this `TRAINONCE_HOME`."""
    Path("/proc/self/comm").write_text(name_of(home))
