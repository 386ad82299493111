"""The guard itself; run by path, so it imports nothing but the standard library.

It hears from the launcher which process groups exist. When the connection ends with some
left, the launcher was killed: groups that do not speak our protocol are killed at once, the
others after the grace, or as soon as their leader has ended.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time


def _listen(sock: socket.socket) -> dict[int, bool]:
    workers: dict[int, bool] = {}
    with sock.makefile("r") as lines:
        for line in lines:
            verb, pid = line.split()
            if verb == "add":
                workers[int(pid)] = False
            elif verb == "trust":
                workers[int(pid)] = True
            else:
                workers.pop(int(pid), None)
    return workers


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end(workers: dict[int, bool], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    poll = select.poll()
    leaders: dict[int, int] = {}
    for pid, trusted in workers.items():
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            fd = -1
        if not trusted or fd < 0:
            _kill(pid)
            continue
        leaders[fd] = pid
        poll.register(fd, select.POLLIN)
    while leaders and time.monotonic() < deadline:
        for fd, _event in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            poll.unregister(fd)
            _kill(leaders.pop(fd))
    for pid in leaders.values():
        _kill(pid)


if __name__ == "__main__":
    _end(_listen(socket.socket(fileno=int(sys.argv[1]))), float(sys.argv[2]))
