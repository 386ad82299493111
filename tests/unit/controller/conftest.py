"""A bench for the control loop: it is stepped by hand over workers that are not processes.

Connections, descriptors and progress pages are real; time is a FakeClock. What needs real
processes and signals is in tests/process/test_launcher.py.
"""

import os
import select
import signal

import pytest

from trainonce.clock import FakeClock
from trainonce.controller.job import Job
from trainonce.controller.logs import LogFiles
from trainonce.controller.options import RunOptions
from trainonce.controller.supervisor import Supervisor
from trainonce.engines.base import ExitStatus
from trainonce.wire.channel import Channel
from trainonce.wire.faults import parse_plan
from trainonce.wire.messages import (
    Begin,
    Drain,
    Drained,
    FaultFiring,
    Formed,
    Hello,
    Mirror,
    Parked,
    Ready,
)
from trainonce.wire.progress import Progress


class FakeProcess:
    host = "here"

    """Both sides of a worker: the launcher's view, and what the test makes the worker do."""

    def __init__(self, worker, spec):
        self._came = []
        self.worker, self.spec, self.pid = worker, spec, 1_000_000 + worker
        self.channel, theirs = Channel.pair()
        self.inside = Channel(theirs)
        self.progress, fd = Progress.create()
        os.close(fd)
        self.exit_fd = os.eventfd(0)
        self.dying_fd = os.eventfd(0)
        self.doomed_to = None
        self.status = None
        self.stopped = False
        self.immortal = False
        self.signals = []
        self.told = []
        self.reaped = False

    def signal_group(self, signum):
        self.signals.append(signal.Signals(signum))
        if signum in (signal.SIGKILL, signal.SIGTERM) and not self.immortal:
            self.end(signum=signum)

    def signal_leader(self, signum):
        self.told.append(signum)

    def reap(self):
        assert self.status is not None, "reaped before it ended"
        self.reaped = True
        return self.status

    def trust(self):
        pass

    def expect_death(self):
        pass

    def dying(self):
        return self.doomed_to

    def is_stopped(self):
        return self.stopped

    def close(self):
        self.channel.close()
        self.progress.close()
        os.close(self.exit_fd)
        os.close(self.dying_fd)

    # what the worker does

    def say(self, message, fds=()):
        self.inside.send(message, fds)

    def heard(self, kind=object):
        """Take the messages of `kind` that came so far."""
        while select.select([self.inside], [], [], 0)[0]:
            messages, alive = self.inside.receive_ready()
            self._came += messages
            if not alive:
                break
        found = [each for each in self._came if isinstance(each, kind)]
        self._came = [each for each in self._came if not isinstance(each, kind)]
        return found

    def begin_to_die(self, signum):
        """All its threads are exiting; the kernel has yet to free its memory."""
        self.doomed_to = ExitStatus(signum=signum)
        os.eventfd_write(self.dying_fd, 1)

    def end(self, code=0, signum=0):
        if self.status is None:
            self.status = ExitStatus(code=code, signum=signum)
            os.eventfd_write(self.exit_fd, 1)


class FakeEngine:
    host = "here"

    def __init__(self):
        self.started = []

    def start(self, spec):
        self.started.append(FakeProcess(spec.worker, spec))
        return self.started[-1]

    preparing = False

    def preload(self, spec):
        pass

    def maintain(self):
        pass

    def close(self):
        pass


class FakeStore:
    port = 1234

    def start(self):
        pass

    def renew(self):
        self.port += 1

    def close(self):
        pass


class Bench:
    """A supervisor on a bench: its workers, clock, ledger and lines are at hand."""

    def __init__(self, folder, chaos="", **options):
        self.clock = FakeClock()
        self.engine = FakeEngine()
        self.events, self.lines = [], []
        script = folder / "train.py"
        script.write_text("")
        opts = RunOptions(script=str(script), chaos=tuple(parse_plan(chaos)), **options)
        job = Job(
            opts, job_id="j", folder=folder, engine=self.engine, clock=self.clock, ledger=self,
            view=self, logs=LogFiles(opts, folder / "logs", "j", self.say),
            store=FakeStore(),
        )  # fmt: skip
        self.supervisor = Supervisor(job)
        self.job = job
        self.supervisor.start()

    def append(self, job_id, event):
        self.events.append(event)

    def say(self, text):
        self.lines.append(text)

    def step(self, advance_s=0.0):
        """Let the launcher take in everything that is there; time moves by `advance_s`."""
        self.clock.advance(advance_s)
        for _ in range(4):
            self.supervisor.step_once(0)

    def ready(self, mirrors=False):
        """Bring the ranks of this incarnation before their first step, and spares to the loop."""
        for rank, worker in enumerate(self.job.membership.workers):
            process = self.engine.started[worker]
            process.say(Hello(worker=worker, pid=process.pid))
            if mirrors:
                fd = os.memfd_create("mirror")
                os.write(fd, b"state of rank %d" % rank)
                process.say(Mirror(rank=rank, size_bytes=16), [fd])
                os.close(fd)
            process.say(Ready())
        self.step()
        self.park()
        for process in self.engine.started:
            process.heard()
        return self

    def park(self):
        for handle in list(self.job.spares()):
            if not handle.parked:
                self.process(handle).say(Hello(worker=handle.worker, pid=handle.pid))
                self.process(handle).say(Parked(where="loop", rehearsed=1))
        self.step()

    def process(self, handle):
        return self.engine.started[handle.worker]

    def rank(self, rank):
        return self.engine.started[self.job.membership.workers[rank]]

    def commit(self, step, ranks=None):
        for rank in range(self.job.options.nproc) if ranks is None else ranks:
            page = self.rank(rank).progress
            page["commits"] = step
            page["changed_mono_ns"] = int(self.clock.mono_s() * 1e9)
        self.step()

    def form(self, step, ranks=None, **fields):
        """Let ranks report that they stand in the current generation."""
        generation = self.job.membership.generation
        for rank in range(self.job.options.nproc) if ranks is None else ranks:
            self.rank(rank).say(Formed(generation=generation, step=step, **fields))
        self.step()

    def drain(self, rank):
        """Let a rank that was told to do so stand at a commit; return its worker."""
        process = self.rank(rank)
        (order,) = process.heard(Drain)
        process.say(Drained(step=process.progress["commits"], generation=order.generation))
        self.step()
        return process

    def meet(self, index, rank):
        """Let a rank come to fault `index` of the plan; return whether it may go on."""
        self.rank(rank).say(FaultFiring(index=index, step=self.job.step, point="begin"))
        self.step()
        return bool(self.rank(rank).heard(Begin))

    def of_kind(self, kind):
        return [event for event in self.events if event.kind == kind]


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(**options):
        made.append(Bench(tmp_path, **{"nproc": 2, **options}))
        return made[-1]

    yield make
    for one in made:
        for process in one.engine.started:
            if process.worker in one.job.workers:
                process.end(signum=signal.SIGKILL)
        one.supervisor.close()
        for process in one.engine.started:
            process.inside.close()
