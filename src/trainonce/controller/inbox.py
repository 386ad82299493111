"""What the workers say: each message of theirs, and which part of the launcher acts on it."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING, Any

from trainonce import settings
from trainonce.errors import TrainOnceError, WireError
from trainonce.events import FaultInjected, SpareParked, from_record
from trainonce.wire import messages
from trainonce.wire.faults import AWAITED_FAULTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.controller.capacity import Capacity
    from trainonce.controller.ending import Ending
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.controller.migration import Migration
    from trainonce.controller.recovery import Recovery
    from trainonce.controller.staff import Staff
    from trainonce.controller.watch import Watch
    from trainonce.wire.messages import Message


class Inbox:
    """Reads the connections of workers.

    Args:
        job: The job.
        ending: Hears which ranks are done, and of checkpoints.
        staff: Keeps spares once the script is known to use the package.
        recovery: Hears what concerns generations.
        migration: Hears of drained ranks, and of spares that are ready.
        watch: Tells spares how far the job is.
        capacity: Takes slots away, as the fault plan wants.
    """

    def __init__(
        self, job: Job, ending: Ending, staff: Staff, recovery: Recovery, migration: Migration,
        watch: Watch, capacity: Capacity,
    ) -> None:  # fmt: skip
        self._job = job
        self._ending = ending
        self._staff = staff
        self._recovery = recovery
        self._migration = migration
        self._watch = watch
        self._capacity = capacity
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

    def read(self, handle: WorkerHandle) -> None:
        """Take in what a worker has said, and listen no more to one that broke the protocol."""
        try:
            found, alive = handle.process.channel.receive_ready()
            for message in found:
                self._handle(handle, message)
        except WireError as error:
            self._job.say(f"worker {handle.worker} (pid {handle.pid}) broke the protocol: {error}")
            handle.process.signal_group(signal.SIGKILL)
            alive = False
        if not alive:
            self._job.disconnect(handle)

    def read_the_rest(self, handle: WorkerHandle) -> None:
        """Take in the last words of a worker that has ended.

        They (the fault that fires, the exception) decide how its end is read.
        """
        while handle.connected and select.select([handle.process.channel], [], [], 0)[0]:
            self.read(handle)

    def _handle(self, handle: WorkerHandle, message: Message) -> None:
        act = self._handlers.get(type(message))
        if act is None:
            raise WireError(f"{type(message).__name__} is not for the launcher")
        act(handle, message)

    def _on_hello(self, handle: WorkerHandle, message: messages.Hello) -> None:
        job = self._job
        handle.said_hello = True
        handle.device = message.device
        handle.stacks_signals = message.stacks_signals
        job.slots.note_device(handle.slot, message.device)
        handle.process.trust()
        first = not job.uses_trainonce
        job.uses_trainonce = True
        if handle.rank >= 0:
            job.send_generation(handle.rank)
        else:
            self._watch.tell(handle)
            self._recovery.serve()
        if first:
            if message.preloadable and settings.PRELOAD.get() != "0":
                job.preload()
            self._staff.keep_spares()

    def _on_ready(self, handle: WorkerHandle, message: messages.Ready) -> None:
        job = self._job
        handle.ready = True
        if handle.rank < 0:
            return
        handle.process.expect_death()
        job.resumed = message.resumed
        self._recovery.join(handle.rank)
        ranked = job.ranked()
        if len(ranked) == job.options.nproc and all(h.ready for h in ranked):
            job.all_ready = True
            for each in ranked:
                each.send(messages.Begin())

    def _on_parked(self, handle: WorkerHandle, message: messages.Parked) -> None:
        job = self._job
        handle.parked = message.where
        job.record(
            SpareParked(
                worker=handle.worker, pid=handle.pid, where=message.where,
                rehearsed=message.rehearsed, hint=message.hint,
            )
        )  # fmt: skip
        self._recovery.serve()
        self._migration.advance()

    def _on_mirror(self, handle: WorkerHandle, message: messages.Mirror) -> None:
        fd = handle.process.channel.take_fd()
        if handle.rank == message.rank:
            self._job.mirrors.keep(message.rank, fd)
        else:
            os.close(fd)

    def _on_shadow(self, handle: WorkerHandle, message: messages.Shadow) -> None:
        fd = handle.process.channel.take_fd()
        if handle.rank == message.rank:
            self._job.shadows.keep(message.rank, fd)
        else:
            os.close(fd)

    def _on_peer_lost(self, handle: WorkerHandle, message: messages.PeerLost) -> None:
        if handle.rank >= 0 and not handle.dismissed:
            self._recovery.handle_peer_lost(message)

    def _on_formed(self, handle: WorkerHandle, message: messages.Formed) -> None:
        # Connected again in its set-up, a rank stands before its first step when it says `Ready`.
        in_set_up = not (self._job.all_ready or handle.ready or message.error)
        if handle.rank >= 0 and not handle.dismissed and not in_set_up:
            handle.process.expect_death()
            handle.ready = True
            self._recovery.handle_formed(handle, message)

    def _on_fault_firing(self, handle: WorkerHandle, message: messages.FaultFiring) -> None:
        job = self._job
        faults = {fault.index: fault for fault in job.options.chaos}
        fault = faults.get(message.index)
        if fault is not None and fault.action in AWAITED_FAULTS:
            job.awaited[fault.index] = handle
            return
        handle.firing = message
        job.fired.add(message.index)
        if fault is not None and fault.action == "lose":
            self._capacity.lose(handle.slot, for_s=fault.seconds)
        job.record(
            FaultInjected(
                fault=fault.action if fault else "unknown", rank=handle.rank, step=message.step,
                point=message.point, pid=handle.pid,
            )
        )  # fmt: skip

    def _on_drained(self, handle: WorkerHandle, message: messages.Drained) -> None:
        self._migration.handle_drained(handle, message.generation)

    def _on_done(self, handle: WorkerHandle, message: messages.Done) -> None:
        job = self._job
        if handle.rank < 0 or handle.dismissed:
            return
        job.done_ranks.add(handle.rank)
        job.step = max(job.step, message.step)
        self._ending.check_done()

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
            self._ending.note_checkpoint()
        self._job.record(event)

    def _on_note(self, handle: WorkerHandle, message: messages.Note) -> None:
        self._job.say(message.text, once=f"note {message.key}")
