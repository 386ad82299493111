"""Starts all ranks: at the beginning of the job, and again where no rank can be rebuilt."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from trainonce.controller.exit_codes import ExitCode
from trainonce.controller.membership import Membership
from trainonce.controller.policy import WhenNoSpare, place_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.controller.ending import Ending
    from trainonce.controller.job import Job
    from trainonce.controller.staff import Staff


class Restart:
    """Ends every ranked worker and starts all again, as often as `--max-restarts` allows.

    Args:
        job: The job.
        ending: Ends the job where no restart is left.
        staff: Knows what becomes of ranks without room.
    """

    def __init__(self, job: Job, ending: Ending, staff: Staff) -> None:
        self._job = job
        self._ending = ending
        self._staff = staff
        self._count = 0
        self._restarted_at = -1

    @property
    def is_used_up(self) -> bool:
        """Whether no restart is left."""
        return self._count >= self._job.max_restarts

    def begin(self, slots: Sequence[int]) -> None:
        """Start a worker for every rank; the first generation is the membership from then on.

        Args:
            slots: Where, by rank.
        """
        job = self._job
        job.resume_from = job.find_resume()
        workers = tuple(job.start_worker(slot, rank).worker for rank, slot in enumerate(slots))
        job.membership = Membership(workers=workers, incarnation=job.membership.incarnation)
        job.forming_since_s = job.clock.mono_s()

    def run(self, served_by: str, why: str) -> None:
        """End every ranked worker, to start all again from the last durable checkpoint."""
        job = self._job
        if job.restarting or job.is_ending:
            return
        if job.has_shadows and job.step > self._restarted_at:
            self._count = 0  # nothing is lost by one, and the job gets on between them
        self._restarted_at = job.step
        if self.is_used_up:
            self._ending.finish(
                ExitCode.NOT_RECOVERED,
                "lost",
                f"{why}, and {self._count} restarts were used up (--max-restarts)",
            )
            return
        self._count += 1
        job.restarting = True
        if served_by == "checkpoint" and not job.find_resume():
            served_by = "restart"
        job.incidents.announce(served_by)
        job.say(f"{why}: starting all ranks again")
        spares = job.spares()
        usable = sum(status.usable for status in job.slot_statuses())
        too_many = max(0, job.options.nproc + len(spares) - usable)
        drained = [job.reserve.handle] if job.reserve is not None else []
        job.reserve = None
        for handle in (*job.ranked(), *spares[:too_many], *drained):
            handle.dismissed = True
            handle.process.signal_group(signal.SIGKILL)
        self.proceed()

    def proceed(self) -> None:
        """Start the new incarnation once every worker of the old one is reaped."""
        job = self._job
        leaving = any(h.rank >= 0 or (h.dismissed and h.lives) for h in job.workers.values())
        if not job.restarting or job.is_ending or leaving:
            return
        slots = place_ranks(job.options.nproc, job.slot_statuses(), self._staff.when_no_spare)
        if not slots:
            self._wait_for_room()
            return
        job.short = 0
        job.restarting = False
        job.restarted = True
        job.all_ready = False
        job.step = 0
        job.done_ranks.clear()
        job.mirrors.drop()
        if not job.uses_trainonce:
            # Keys of ours are scoped by incarnation; those of a plain script are not.
            job.store.renew()
        job.membership = job.membership.restart(job.membership.workers)
        self.begin(slots)
        # Known only now: a checkpoint may have been completed while the old ranks were ending.
        source = job.resume_from or "the beginning"
        if job.has_shadows:
            source = "the shadows of their state"
        job.say(f"the ranks start from {source}")
        job.incidents.give_to_guests(job.guests().keys())

    def _wait_for_room(self) -> None:
        job = self._job
        usable = sum(status.usable and not status.workers for status in job.slot_statuses())
        job.short = max(1, job.options.nproc - usable)
        if job.options.when_no_spare is WhenNoSpare.CHECKPOINT:
            self._staff.end_for_want_of_room()
        else:
            job.say(
                f"waiting for {job.short} devices, to start all ranks again",
                once=f"no room {job.membership.incarnation}",
            )
