"""Noticing that a process dies before the kernel has taken it apart.

A pidfd turns readable when a process is gone, its memory freed and its devices closed: 0.15 s
after SIGKILL with 2 GB. None of its code runs any more from the moment at which all its threads
are exiting. The pidfd of a single thread (`PIDFD_THREAD`, Linux 6.9) tells of that at once, as
long as the thread is not the one that is left to do the work.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

from trainonce.engines.base import ExitStatus

_PIDFD_THREAD = os.O_EXCL
_PF_EXITING = 0x4
# Positions after the name in /proc/PID/stat; see proc_pid_stat(5).
_FLAGS, _EXIT_CODE = 6, 49
_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
# One that is not the last to go would do; each takes a descriptor.
_MAX_THREADS = 8
# A thread that cannot be interrupted may take long: then the end is noticed when it is complete.
_MAX_LOOKS = 1000


class EarlyDeath:
    """Watches threads of a process; on a kernel without the means it never tells of anything.

    Args:
        pid: The process, not yet reaped.
    """

    def __init__(self, pid: int) -> None:
        self._task = Path(f"/proc/{pid}/task")
        self._pid = pid
        self._poll = select.epoll()
        self._threads: dict[int, int] = {}
        self._looks = 0

    @property
    def fd(self) -> int:
        """Descriptor that turns readable when a watched thread has ended."""
        return self._poll.fileno()

    def watch(self) -> None:
        """Watch threads that the process has by now, apart from the first."""
        with contextlib.suppress(OSError):
            watched = set(self._threads.values())
            for name in sorted(map(int, os.listdir(self._task)))[: _MAX_THREADS + 1]:
                if name != self._pid and name not in watched:
                    fd = os.pidfd_open(name, _PIDFD_THREAD)
                    self._threads[fd] = name
                    self._poll.register(fd, select.EPOLLIN)

    def look(self) -> ExitStatus | None:
        """Return how the process ends, if it does and none of its code runs any more.

        None also where a thread alone has ended, or the process ends with code 0: nobody is in a
        hurry then. As long as some thread has not noticed yet, `fd` stays readable: look again.
        """
        status = self._ending()
        if status is not None and self._is_still():
            return status
        self._looks = 0 if status is None else self._looks + 1
        if status is None or self._looks > _MAX_LOOKS:
            for fd, _events in self._poll.poll(0):
                del self._threads[fd]
                os.close(fd)
        return None

    def _is_still(self) -> bool:
        """Tell whether every thread of the process is exiting."""
        try:
            return all(
                int(_stat(self._task / name)[_FLAGS]) & _PF_EXITING
                for name in os.listdir(self._task)
            )
        except OSError:
            return False  # one of them went meanwhile

    def _ending(self) -> ExitStatus | None:
        try:
            code = int(_stat(self._task.parent)[_EXIT_CODE])
        except OSError:
            return None
        signum = code & 0x7F
        if not code or signum in _STOPS:
            return None
        return ExitStatus(signum=signum) if signum else ExitStatus(code=code >> 8)

    def close(self) -> None:
        """Release the descriptors."""
        for fd in self._threads:
            os.close(fd)
        self._poll.close()


def _stat(folder: Path) -> list[bytes]:
    return (folder / "stat").read_bytes().rpartition(b")")[2].split()
