"""Follows the slots of a job: goes on when there is room again, and brings guests home."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.controller.incidents import duration
from trainonce.events import GuestsChanged

if TYPE_CHECKING:
    from trainonce.controller.job import Job
    from trainonce.controller.migration import Migration
    from trainonce.controller.recovery import Recovery
    from trainonce.controller.restart import Restart


class Capacity:
    """Acts on what the slots allow, a few times a second.

    Args:
        job: The job.
        recovery: Serves ranks that wait for room.
        restart: Starts all ranks once there is room for them.
        migration: Moves guests to slots of their own.
    """

    def __init__(
        self, job: Job, recovery: Recovery, restart: Restart, migration: Migration
    ) -> None:
        self._job = job
        self._recovery = recovery
        self._restart = restart
        self._migration = migration
        self._guests: dict[int, int] = {}
        self._since_s = 0.0

    def look(self) -> None:
        """Serve who waits if there is room now; bring a guest home."""
        job = self._job
        if job.is_ending:
            return
        if job.short:
            self._recovery.serve()
            self._restart.proceed()
        if not job.membership.is_formed or job.restarting:
            return
        if not job.stopping and job.all_ready and not self._migration.is_busy:
            self._dismiss_idle_guests()
            self._bring_home()

    def lose(self, slot: int, *, for_s: float = 0.0) -> None:
        """Take `slot` away, as the fault plan wants; for good where `for_s` is 0."""
        self._job.slots.lost.add(slot)
        if for_s:
            self._job.timers.after(for_s, lambda: self._job.slots.lost.discard(slot))

    def restore(self) -> None:
        """Give back what `lose` took."""
        self._job.slots.lost.clear()

    def tell_guests(self) -> None:
        """Tell which ranks share a device in the generation that has formed, if that is news."""
        job, guests, now_s = self._job, self._job.guests(), self._job.clock.mono_s()
        if guests == self._guests:
            return
        if not guests:
            took = duration(now_s - self._since_s)
            job.say(f"no rank shares a device any more: {took} at reduced speed")
        elif not self._guests:
            self._since_s = now_s
        self._guests = guests
        ranks = sorted(guests)
        job.record(
            GuestsChanged(ranks=ranks, hosts=[guests[rank] for rank in ranks], step=job.step)
        )

    def _bring_home(self) -> None:
        job = self._job
        ready = any(status.fit and status.where for status in job.spare_statuses())
        free = any(status.usable and not status.workers for status in job.slot_statuses())
        if self._guests and (ready or free):
            self._migration.request(
                min(self._guests), lambda _ok, _text: None, detail="a device is free again",
                detected_by="capacity",
            )  # fmt: skip

    def _dismiss_idle_guests(self) -> None:
        """Let go of a spare that was started beside a rank, for a rank that found better."""
        job = self._job
        crowded = {status.slot for status in job.slot_statuses() if status.workers > 1}
        for handle in job.spares():
            if handle.slot in crowded:
                job.dismiss(handle)
