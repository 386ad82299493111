"""The control loop of a job. One iteration is `step_once`, so that tests can step it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import select
import selectors
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

from trainonce import settings
from trainonce.controller import control_socket
from trainonce.controller.capacity import Capacity
from trainonce.controller.chaos import Chaos
from trainonce.controller.ending import Ending
from trainonce.controller.health import Health
from trainonce.controller.migration import Migration
from trainonce.controller.recovery import Recovery
from trainonce.controller.watch import Watch
from trainonce.errors import TrainOnceError, WireError
from trainonce.events import FaultInjected, JobEnded, JobStarted, SpareParked, from_record
from trainonce.wire import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.controller.control_socket import Client, ControlServer
    from trainonce.controller.costs import Costs
    from trainonce.controller.job import Job, WorkerHandle
    from trainonce.controller.live import LiveView
    from trainonce.fleet.feed import Feed, HealthSettings
    from trainonce.wire.messages import Message


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
        self.recovery = Recovery(job, self.ending)
        self.migration = Migration(job, self.recovery)
        self.watch = Watch(job, self.recovery)
        self.capacity = Capacity(job, self.recovery, self.migration)
        self.chaos = Chaos(job, self.recovery, self.migration, self.capacity)
        self.health = Health(job, self.migration, *health) if health is not None else None
        self.costs: Costs | None = None
        self._live = live
        self._control = control
        self._signals: socket.socket | None = None
        self._handlers: dict[type[object], Callable[[WorkerHandle, Any], None]] = {
            messages.Hello: self._on_hello,
            messages.Ready: self._on_ready,
            messages.Parked: self._on_parked,
            messages.Mirror: self._on_mirror,
            messages.Shadow: self._on_shadow,
            messages.PeerLost: self._on_peer_lost,
            messages.Formed: self._on_formed,
            messages.FaultFiring: self._on_fault_firing,
            messages.Drained: self._on_drained,
            messages.Done: self._on_done,
            messages.Failed: self._on_failed,
            messages.Report: self._on_report,
            messages.Note: self._on_note,
        }
        job.on_incident = self.migration.handle_incident
        if control is not None:
            job.selector.register(control.fileno(), selectors.EVENT_READ, ("control", control))

    # ------------------------------------------------------------------ the loop

    def run(self) -> int:
        """Start the workers, see the job through, and return the exit code.

        Call it from the main thread: it handles the signals that end a job.
        """
        with self._handling_signals():
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
        self.recovery.begin(range(options.nproc))
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
                self._read(source)
            elif kind == "control":
                self._accept(source)
            elif kind == "request":
                self._serve(source)
            elif kind == "signal":
                self._take_signals()
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
        job.drop_mirrors()
        job.drop_shadows()
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
            self._read_the_rest(handle)
            if not self._is_expected(handle):
                dead.append(handle)
        ranked = [handle for handle in dead if handle.rank >= 0]
        if ranked:
            self.migration.handle_deaths(ranked)
            self.recovery.handle_deaths(ranked)
        for handle in dead:
            if handle.rank < 0:
                self.recovery.handle_spare_death(handle)
        for handle in exited:
            job.forget(handle)
        if exited:
            self.recovery.continue_restart()
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

    def _read_the_rest(self, handle: WorkerHandle) -> None:
        # What it said last (the fault that fires, the exception) decides how its end is read.
        while handle.connected and select.select([handle.process.channel], [], [], 0)[0]:
            self._read(handle)

    # ------------------------------------------------------------------ messages

    def _read(self, handle: WorkerHandle) -> None:
        try:
            found, alive = handle.process.channel.receive_ready()
            for message in found:
                self._handle(handle, message)
        except WireError as error:
            self.job.say(f"worker {handle.worker} (pid {handle.pid}) broke the protocol: {error}")
            handle.process.signal_group(signal.SIGKILL)
            alive = False
        if not alive:
            self.job.disconnect(handle)

    def _handle(self, handle: WorkerHandle, message: Message) -> None:
        act = self._handlers.get(type(message))
        if act is None:
            raise WireError(f"{type(message).__name__} is not for the launcher")
        act(handle, message)

    def _on_hello(self, handle: WorkerHandle, message: messages.Hello) -> None:
        job = self.job
        handle.said_hello = True
        handle.device = message.device
        handle.stacks_signal = message.stacks_signal
        job.slots.note_device(handle.slot, message.device)
        handle.process.trust()
        first = not job.uses_trainonce
        job.uses_trainonce = True
        if handle.rank >= 0:
            job.send_generation(handle.rank)
        else:
            self.watch.tell(handle)
            self.recovery.serve()
        if first:
            if message.preloadable and settings.PRELOAD.get() != "0":
                job.preload()
            self.recovery.keep_spares()

    def _on_ready(self, handle: WorkerHandle, message: messages.Ready) -> None:
        job = self.job
        handle.ready = True
        if handle.rank < 0:
            return
        handle.process.expect_death()
        job.resumed = message.resumed
        if job.membership.generation == 1:
            self.recovery.join(handle.rank)
        ranked = job.ranked()
        if len(ranked) == job.options.nproc and all(h.ready for h in ranked):
            job.all_ready = True

    def _on_parked(self, handle: WorkerHandle, message: messages.Parked) -> None:
        job = self.job
        handle.parked = message.where
        job.record(
            SpareParked(
                worker=handle.worker, pid=handle.pid, where=message.where,
                rehearsed=message.rehearsed, hint=message.hint,
            )
        )  # fmt: skip
        self.recovery.serve()
        self.migration.advance()

    def _on_mirror(self, handle: WorkerHandle, message: messages.Mirror) -> None:
        fd = handle.process.channel.take_fd()
        if handle.rank == message.rank:
            self.job.keep_mirror(message.rank, fd)
        else:
            os.close(fd)

    def _on_shadow(self, handle: WorkerHandle, message: messages.Shadow) -> None:
        fd = handle.process.channel.take_fd()
        if handle.rank == message.rank:
            self.job.keep_shadow(message.rank, fd)
        else:
            os.close(fd)

    def _on_peer_lost(self, handle: WorkerHandle, message: messages.PeerLost) -> None:
        self.recovery.handle_peer_lost(message)

    def _on_formed(self, handle: WorkerHandle, message: messages.Formed) -> None:
        if handle.rank >= 0 and not handle.dismissed:
            handle.process.expect_death()
            handle.ready = True
            self.recovery.handle_formed(handle, message)

    def _on_fault_firing(self, handle: WorkerHandle, message: messages.FaultFiring) -> None:
        job = self.job
        handle.firing = message
        job.fired.add(message.index)
        faults = {fault.index: fault for fault in job.options.chaos}
        fault = faults.get(message.index)
        if fault is not None and fault.action == "lose":
            self.capacity.lose(handle.slot, for_s=fault.seconds)
        job.record(
            FaultInjected(
                fault=fault.action if fault else "unknown", rank=handle.rank, step=message.step,
                point=message.point, pid=handle.pid,
            )
        )  # fmt: skip

    def _on_drained(self, handle: WorkerHandle, message: messages.Drained) -> None:
        self.migration.handle_drained(handle)

    def _on_done(self, handle: WorkerHandle, message: messages.Done) -> None:
        job = self.job
        if handle.rank < 0 or handle.dismissed:
            return
        job.done_ranks.add(handle.rank)
        job.step = max(job.step, message.step)
        self.ending.check_done()

    def _on_failed(self, handle: WorkerHandle, message: messages.Failed) -> None:
        # It has nothing more to do: do not wait for its exit handlers.
        handle.failed = message
        handle.process.signal_group(signal.SIGKILL)

    def _on_report(self, handle: WorkerHandle, message: messages.Report) -> None:
        try:
            event = from_record(message.event)
        except TrainOnceError as error:
            raise WireError(f"a report that is no event: {error}") from error
        if event.kind == "checkpoint_saved":
            self.ending.note_checkpoint()
        self.job.record(event)

    def _on_note(self, handle: WorkerHandle, message: messages.Note) -> None:
        self.job.say(message.text, once=f"note {message.key}")

    # ------------------------------------------------------------------ requests

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

    # ------------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _handling_signals(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        theirs, self._signals = socket.socketpair()
        theirs.setblocking(False)
        self.job.selector.register(self._signals, selectors.EVENT_READ, ("signal", None))
        before = {s: signal.signal(s, lambda *_: None) for s in self.job.options.signals}
        wakeup = signal.set_wakeup_fd(theirs.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            theirs.close()
            self._signals.close()

    def _take_signals(self) -> None:
        assert self._signals is not None
        for signum in self._signals.recv(64):
            if signum in self.job.options.signals:
                self.ending.stop(signum)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
