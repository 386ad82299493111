"""The launcher's side of the guard process that leaves no orphans, whatever is killed."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

_PROGRAM = Path(__file__).with_name("guard_process.py")


class Guard:
    """Keeps a small process that ends the workers should the launcher be killed.

    A parent-death signal will not do: workers that speak our protocol must be left the time
    to finish their step and write a checkpoint, and which ones do is known only later. The
    guard is started before the first worker, and again if somebody killed it.

    Args:
        grace_s: How long trusted workers may take to end by themselves.
    """

    def __init__(self, *, grace_s: float) -> None:
        self._grace_s = grace_s
        self._workers: dict[int, bool] = {}
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the guard; 0 before the first worker."""
        return self._process.pid if self._process else 0

    def add(self, pid: int) -> None:
        """Watch over the process group of `pid`."""
        self._workers[pid] = False
        self._tell(f"add {pid}")

    def trust(self, pid: int) -> None:
        """Grant `pid` the grace."""
        self._workers[pid] = True
        self._tell(f"trust {pid}")

    def remove(self, pid: int) -> None:
        """Forget `pid`: it was killed and collected."""
        self._workers.pop(pid, None)
        self._tell(f"remove {pid}")

    def ensure(self) -> None:
        """Start the guard if it does not run, for the first time or again."""
        if self._process is None or self._process.poll() is not None:
            self._start()

    def close(self) -> None:
        """Dismiss the guard and collect it."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _tell(self, line: str) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.sendall(line.encode() + b"\n")
                return
        self._start()

    def _start(self) -> None:
        if self._process is not None:
            self._process.wait()
        if self._sock is not None:
            self._sock.close()
        self._sock, theirs = socket.socketpair()
        lines = [f"add {pid}\n" for pid in self._workers]
        lines += [f"trust {pid}\n" for pid, trusted in self._workers.items() if trusted]
        # Before it starts: from its first moment it knows whom to watch.
        self._sock.sendall("".join(lines).encode())
        with theirs:
            self._process = subprocess.Popen(
                # Isolated and without site-packages: a small process that starts in a breath.
                [sys.executable, "-I", "-S", str(_PROGRAM), str(theirs.fileno()),
                 str(self._grace_s)],
                stdin=subprocess.DEVNULL,
                # It may outlive the launcher: nobody is to wait for the end of its output.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )  # fmt: skip
