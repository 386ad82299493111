"""The control loop of a job. One iteration is `step_once`, so that tests can step it."""

from __future__ import annotations

import importlib.metadata
import platform
import selectors
import signal
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.controller import control_socket, signals
from trainonce.controller.capacity import Capacity
from trainonce.controller.chaos import Chaos
from trainonce.controller.ending import Ending
from trainonce.controller.health import Health
from trainonce.controller.inbox import Inbox
from trainonce.controller.migration import Migration
from trainonce.controller.recovery import Recovery
from trainonce.controller.restart import Restart
from trainonce.controller.staff import Staff
from trainonce.controller.watch import Watch
from trainonce.errors import WireError
from trainonce.events import JobEnded, JobStarted

if TYPE_CHECKING:
    import socket

    from trainonce.controller.control_socket import Client, ControlServer
    from trainonce.controller.costs import Costs
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.controller.live import LiveView
    from trainonce.fleet.feed import Feed, HealthSettings


class Supervisor:
    """Runs one job from its start to its end.

    Args:
        job: The job; owned, and closed at the end.
        live: Shows progress; None for silence.
        control: Answers `trainonce ps`, `migrate` and `drain`; None for none.
        health: What is read of this host, and what may follow; None for nothing.
    """

    def __init__(
        self, job: Job, *, live: LiveView | None = None, control: ControlServer | None = None,
        health: tuple[Feed, HealthSettings] | None = None,
    ) -> None:  # fmt: skip
        self.job = job
        self.ending = Ending(job)
        self.staff = Staff(job, self.ending)
        self.restart = Restart(job, self.ending, self.staff)
        self.recovery = Recovery(job, self.ending, self.staff, self.restart)
        self.migration = Migration(job, self.recovery)
        self.watch = Watch(job, self.recovery)
        self.capacity = Capacity(job, self.recovery, self.restart, self.migration)
        self.inbox = Inbox(
            job, self.ending, self.staff, self.recovery, self.migration, self.watch, self.capacity
        )
        self.chaos = Chaos(job, self.recovery, self.migration, self.capacity)
        self.health = Health(job, self.migration, *health) if health is not None else None
        self.costs: Costs | None = None
        self._live = live
        self._control = control
        job.on_incident = self.migration.handle_incident
        job.on_formed = self.capacity.tell_guests
        if control is not None:
            job.selector.register(control.fileno(), selectors.EVENT_READ, ("control", control))

    # ------------------------------------------------------------------ the loop

    def run(self) -> int:
        """Start the workers, see the job through, and return the exit code.

        Call it from the main thread: it handles the signals that end a job.
        """
        with signals.caught(self.job.options.signals) as caught:
            if caught is not None:
                self.job.selector.register(caught, selectors.EVENT_READ, ("signal", caught))
            try:
                self.start()
                while not self.is_over:
                    self.step_once(min(self.watch.interval_s(), self.chaos.interval_s()))
            finally:
                self.close()
        return self.exit_code

    @property
    def is_over(self) -> bool:
        """Whether the outcome is settled and every worker is reaped."""
        return self.job.is_ending and all(h.fenced for h in self.job.workers.values())

    @property
    def exit_code(self) -> int:
        """The exit code of an ended job."""
        assert self.job.exit_code is not None
        return self.job.exit_code

    def start(self) -> None:
        """Start a worker for every rank."""
        job = self.job
        options = job.options
        self.restart.begin(range(options.nproc))
        # After the workers: they import torch at the same time as the store does.
        job.store.start()
        job.record(
            JobStarted(
                job=job.id,
                script=options.script,
                command=[options.script, *options.script_args],
                world_size=options.nproc,
                spares=options.spares,
                host=job.engine.host,
                project=settings.PROJECT.get() or "default",
                versions={
                    "python": platform.python_version(),
                    "torch": _version("torch"),
                    "trainonce": _version("trainonce"),
                },
                resumed_from=job.resume_from,
            )
        )
        if self.health is not None:
            self.health.start()
        if self.costs is not None:
            self.costs.start()

    def step_once(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for something to happen, and act on it."""
        job = self.job
        exited: list[WorkerHandle] = []
        dying: list[WorkerHandle] = []
        for key, _events in job.selector.select(job.timers.wait_s(timeout_s)):
            kind, source = key.data
            if kind == "exit":
                exited.append(source)
            elif kind == "dying":
                dying.append(source)
            elif kind == "message" and source.connected:
                self.inbox.read(source)
            elif kind == "control":
                self._accept(source)
            elif kind == "request":
                self._serve(source)
            elif kind == "signal":
                self._take_signals(source)
        if exited or dying:
            self._handle_exits(exited, dying)
        job.timers.run_due()
        if self.watch.look():
            job.engine.maintain()
            self.migration.advance()
            if self.health is not None:
                self.health.look()
            self.capacity.look()
            if self.costs is not None:
                self.costs.look()
            if self._live is not None:
                self._live.show(self.watch.snapshot)
        self.chaos.look()

    def close(self) -> None:
        """Kill what is left, and release everything."""
        job = self.job
        self.migration.abandon("the job has ended")
        if self.health is not None:
            self.health.close()
        for handle in list(job.workers.values()):
            handle.process.signal_group(signal.SIGKILL)
            if not handle.fenced:
                handle.process.reap()
            job.forget(handle)
        job.mirrors.drop()
        job.shadows.drop()
        if self.costs is not None:
            self.costs.finish()
        if job.exit_code is not None:
            self.watch.record_progress()
            job.record(
                JobEnded(
                    outcome=job.outcome, exit_code=job.exit_code, steps=job.step,
                    reason=job.reason, supported=job.uses_trainonce,
                    unfired=list(map(str, job.unfired)),
                )
            )  # fmt: skip
        if self.costs is not None:
            self.costs.close()
        if self._control is not None:
            self._control.close()
        job.selector.close()
        job.engine.close()
        job.logs.close()

    # ------------------------------------------------------------------ exits

    def _handle_exits(self, exited: list[WorkerHandle], dying: list[WorkerHandle]) -> None:
        job = self.job
        ended = [handle for handle in dying if self._ends_early(handle)]
        for handle in exited:
            status = handle.process.reap()
            if handle.ended is None:
                handle.ended = status
                ended.append(handle)
        dead: list[WorkerHandle] = []
        for handle in ended:
            self.inbox.read_the_rest(handle)
            if not self._is_expected(handle):
                dead.append(handle)
        ranked = [handle for handle in dead if handle.rank >= 0]
        if ranked:
            # A newcomer that has told by now that it holds the state is a living copy.
            for handle in job.ranked():
                if handle.rank in job.membership.newcomers:
                    self.inbox.read_the_rest(handle)
            self.migration.handle_deaths(ranked)
            self.recovery.handle_deaths(ranked)
        for handle in dead:
            if handle.rank < 0:
                self.recovery.handle_spare_death(handle)
        for handle in exited:
            job.forget(handle)
        if exited:
            self.restart.proceed()
            self.ending.check_stopped()

    def _ends_early(self, handle: WorkerHandle) -> bool:
        """Tell whether a rank is lost whose process the kernel still takes apart."""
        if not handle.watched or handle.ended is not None:
            return False
        status = handle.process.dying()
        if status is None:
            return False
        self.job.stop_watching_threads(handle)
        if handle.rank >= 0 and self.job.all_ready:
            handle.ended = status
        return handle.ended is not None

    def _is_expected(self, handle: WorkerHandle) -> bool:
        job = self.job
        if handle.dismissed or job.is_ending or job.stopping:
            return True
        plain = handle.rank >= 0 and not job.uses_trainonce
        assert handle.ended is not None
        if plain and handle.ended.code == 0 and handle.ended.signum == 0:
            job.done_ranks.add(handle.rank)
            self.ending.check_done()
            return True
        return False

    # ------------------------------------------------------------------ signals and requests

    def _take_signals(self, caught: socket.socket) -> None:
        for signum in caught.recv(64):
            if signum in self.job.options.signals:
                self.ending.stop(signum)

    def _accept(self, server: ControlServer) -> None:
        client = server.accept()
        if client is not None:
            self.job.selector.register(client.sock, selectors.EVENT_READ, ("request", client))

    def _serve(self, client: Client) -> None:
        try:
            request = client.read()
        except WireError:
            self.job.selector.unregister(client.sock)
            client.sock.close()
            return
        if request is not None:
            self.job.selector.unregister(client.sock)
            control_socket.serve(self, client, request)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
