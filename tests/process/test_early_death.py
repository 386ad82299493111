"""The end of a process is noticed before the kernel has freed its memory."""

import os
import select
import signal
import subprocess
import sys

import pytest

from trainonce.engines.base import ExitStatus
from trainonce.engines.early_death import EarlyDeath

PROGRAM = """
import mmap, os, sys, threading
state = mmap.mmap(-1, int(sys.argv[1]) << 20)
for page in range(0, len(state), 4096):
    state[page] = 1
for _ in range(4):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
one = threading.Event()
threading.Thread(target=one.wait, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "one":
        one.set()
    else:
        os._exit(int(line))
"""


class Child:
    def __init__(self, megabytes=1):
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(megabytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.popen.stdout.readline()
        self.early = EarlyDeath(self.popen.pid)
        self.early.watch()

    def tell(self, line):
        self.popen.stdin.write(line + "\n")

    def wait(self):
        """Wait until the early sign tells how the process ends, or it has ended."""
        pidfd = os.pidfd_open(self.popen.pid)
        try:
            while True:
                ready = select.select([self.early.fd, pidfd], [], [], 60)[0]
                status = self.early.look() if self.early.fd in ready else None
                if status is not None or pidfd in ready:
                    return status
                assert ready
        finally:
            os.close(pidfd)

    def is_gone(self):
        return os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


@pytest.fixture
def child():
    made = []

    def start(**options):
        made.append(Child(**options))
        return made[-1]

    yield start
    for each in made:
        each.popen.kill()
        each.popen.communicate()
        each.early.close()


def test_a_kill_is_noticed_while_memory_is_still_freed(child):
    early = 0
    for _ in range(5):
        each = child(megabytes=512)
        each.popen.kill()
        assert each.wait() == ExitStatus(signum=signal.SIGKILL)
        early += not each.is_gone()
    assert early


def test_a_stopped_process_that_is_killed_is_noticed(child):
    each = child()
    each.popen.send_signal(signal.SIGSTOP)
    each.popen.kill()
    assert each.wait() in (ExitStatus(signum=signal.SIGKILL), None)


def test_a_thread_that_ends_alone_is_no_death(child):
    each = child()
    each.tell("one")
    assert select.select([each.early.fd], [], [], 60)[0]
    assert each.early.look() is None
    assert not select.select([each.early.fd], [], [], 0)[0]
    each.popen.kill()
    assert each.wait() in (ExitStatus(signum=signal.SIGKILL), None)


def test_the_exit_code_is_told_unless_nothing_failed(child):
    failed, fine = child(), child()
    failed.tell("3")
    fine.tell("0")
    assert failed.wait() in (ExitStatus(code=3), None)
    assert fine.wait() is None


def test_a_kernel_without_the_means_tells_nothing(child, monkeypatch):
    def refused(pid, flags=0):
        raise OSError(22, "Invalid argument")

    each = child()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", refused)
        blind = EarlyDeath(each.popen.pid)
        blind.watch()
    each.popen.kill()
    each.wait()
    assert not select.select([blind.fd], [], [], 0)[0]
    blind.close()
