"""Starts workers where there is room for them: spares to keep, and holders for lost ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.controller.exit_codes import ExitCode
from trainonce.controller.incidents import what_happened
from trainonce.controller.policy import WhenNoSpare, find_room

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.controller.ending import Ending
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.controller.policy import Room

_MAX_SPARE_DEATHS = 3
_PREPARING_S = 0.1
_LOOK_FOR_ROOM_S = 1.0


class Staff:
    """Decides how many workers without a rank there are, and in which slots.

    Args:
        job: The job.
        ending: Ends the job where it is to end for want of room.

    Attributes:
        serve: Gives lost ranks to workers; called before a worker is started late.
        leaves: There is room only to finish the step: the job is to end with a checkpoint.
    """

    def __init__(self, job: Job, ending: Ending) -> None:
        self.serve: Callable[[], None] = lambda: None
        self.leaves = False
        self._job = job
        self._ending = ending
        self._spare_deaths = 0
        self._start_is_due = False
        self._room_is_looked_for = False
        self._guests_fit = True

    @property
    def when_no_spare(self) -> WhenNoSpare:
        """What becomes of a lost rank without room, as things are now."""
        job = self._job
        if not self._guests_fit:
            return WhenNoSpare.WAIT
        # After a signal: what was asked for cannot be had otherwise.
        return WhenNoSpare.CHECKPOINT if job.stopping else job.options.when_no_spare

    def keep_spares(self) -> None:
        """Start spares until there are as many as were asked for."""
        job = self._job
        if (
            not job.uses_trainonce or job.is_ending or job.stopping
            or self._spare_deaths >= _MAX_SPARE_DEATHS
        ):  # fmt: skip
            return
        wanted = max(0, job.options.spares - len(job.spares()))
        room = find_room(wanted, job.slot_statuses(), WhenNoSpare.WAIT)
        if room.short:
            job.say(
                f"{room.short} of {job.options.spares} spares cannot be kept: no device is free",
                once=f"no room for spares {room.short}",
            )
            if not self._room_is_looked_for:
                self._room_is_looked_for = True
                job.timers.after(_LOOK_FOR_ROOM_S, self._look_for_room)
        self._start(room.slots)

    def lose_spare(self, handle: WorkerHandle, *, crowded: bool) -> bool:
        """Take note that a spare died; tell whether another one is to take its place.

        Args:
            handle: The spare.
            crowded: It lacked memory while it shared a device, which proves nothing about spares.
        """
        job = self._job
        if not crowded:
            self._spare_deaths = 0 if handle.parked else self._spare_deaths + 1
        if handle.failed is not None:
            job.logs.write(f"spare{handle.worker}-traceback.txt", handle.failed.traceback)
        job.say(f"spare {handle.worker} (pid {handle.pid}) ended with {handle.ended}")
        if self._spare_deaths < _MAX_SPARE_DEATHS:
            return True
        job.say(
            f"{_MAX_SPARE_DEATHS} spares in a row ended before they were ready: no more are"
            f" kept (logs in {job.logs.folder})",
            once="spares",
        )
        return False

    def stop_sharing(self, detail: str) -> None:
        """Let no slot hold a guest any more: `detail` tells that a device has no room for two."""
        if self._guests_fit:
            self._job.say(
                f"a device does not hold two workers ({detail}): no rank is given to a guest any"
                " more; lost ranks wait for a device"
            )
        self._guests_fit = False

    def find_holders(self, wanted: int) -> None:
        """Start what is missing of `wanted` workers where there is room, or wait for room."""
        job = self._job
        coming = sum(not status.stopped for status in job.spare_statuses())
        room = find_room(max(0, wanted - coming), job.slot_statuses(), self.when_no_spare)
        if job.incidents.wait_for_spare() or room.short != job.short:
            incidents = job.incidents.open
            happened = f"{what_happened(incidents[-1])}; " if incidents else ""
            job.say(f"{happened}no spare is ready, {_what_is_done(room)}")
        job.short = room.short
        self.leaves = self.leaves or room.leave
        if room.short and job.options.when_no_spare is WhenNoSpare.CHECKPOINT:
            self.end_for_want_of_room()
        else:
            self._start(room.slots)

    def end_for_want_of_room(self) -> None:
        """End the job: some ranks have no device, and nobody can finish the step for them."""
        job = self._job
        self._ending.finish(
            ExitCode.NO_CAPACITY,
            "interrupted",
            f"there is no device for {job.short} of {job.options.nproc} ranks; no checkpoint of"
            " the last step could be written",
        )

    def _start(self, slots: Sequence[int]) -> None:
        """Start a worker without a rank in each of `slots`, once the engine can do it quickly."""
        job = self._job
        if not slots or self._start_is_due:
            return
        if not job.engine.preparing:
            for slot in slots:
                job.start_worker(slot)
            return
        self._start_is_due = True
        job.timers.after(_PREPARING_S, self._start_now)

    def _start_now(self) -> None:
        self._start_is_due = False
        self.serve()
        self.keep_spares()

    def _look_for_room(self) -> None:
        self._room_is_looked_for = False
        self.keep_spares()


def _what_is_done(room: Room) -> str:
    if room.short:
        return f"and no device is left for {room.short} rank(s): waiting until one is free again"
    if room.leave:
        return "and no device is left: a guest on another's finishes the step, then a checkpoint"
    if room.shared:
        return "and no device is left: starting a guest on another's; steps take longer"
    return "starting a new worker" if room.slots else "waiting for a spare to start"
