"""How a job ends: completed, failed, or interrupted; in every case without leftovers."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from trainonce.controller.exit_codes import ExitCode
from trainonce.wire.messages import Checkpoint

if TYPE_CHECKING:
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job

# How long a worker may take to leave after it was told to.
_LEAVE_S = 30.0
_TERMINATE_S = 5.0
# After that nobody can reap what is left (uninterruptible); the guard goes on trying.
_GIVE_UP_S = 60.0
# `timeout` and schedulers send SIGTERM to a process and then to its group: that is one signal.
_SAME_SIGNAL_S = 0.5
STOP = Checkpoint(reason="signal", stop=True)


class Ending:
    """Settles the outcome of a job and sees every worker off.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._saved_at_stop = False
        self._stopped_mono_s = 0.0
        self._why = ""

    def check_done(self) -> None:
        """Finish the job if every rank is done."""
        job = self._job
        if len(job.done_ranks) == job.options.nproc:
            self.finish(ExitCode.OK, "completed", "")

    def finish(self, code: int, outcome: str, reason: str) -> None:
        """Settle the outcome and end every worker. The first outcome stays."""
        job = self._job
        if job.is_ending:
            return
        job.exit_code, job.outcome, job.reason = int(code), outcome, reason
        job.incidents.close_all(served=outcome == "completed")
        job.timers.after(_GIVE_UP_S, self._give_up)
        plain = not (job.uses_trainonce or job.stopping)  # it may want to clean up
        for handle in list(job.workers.values()):
            if outcome == "completed":
                self._dismiss(handle)
                continue
            handle.dismissed = True
            handle.process.signal_group(signal.SIGTERM if plain else signal.SIGKILL)
            if plain:
                job.timers.after(_TERMINATE_S, handle.kill)

    def stop(self, signum: int) -> None:
        """End the job for a signal: the first time with a checkpoint, the second time at once."""
        job = self._job
        name = signal.Signals(signum).name
        now_s = job.clock.mono_s()
        code = ExitCode.SIGNALLED + signum
        repeated = signum == signal.SIGTERM and code == job.stopping
        if repeated and now_s - self._stopped_mono_s < _SAME_SIGNAL_S:
            return  # one signal, sent to the process and to its group
        if job.stopping or job.is_ending:
            job.say(f"{name} again: ending at once")
            job.stopping = job.stopping or code
            why = f"{name}, twice" if self._why in ("", name) else f"{self._why}; {name}"
            self.finish(job.stopping, "interrupted", why)
            for handle in job.workers.values():
                handle.process.signal_group(signal.SIGKILL)
            return
        self._stop(code, name)

    def leave(self, why: str) -> None:
        """End the job with a checkpoint, since there is no room for all its ranks."""
        self._stop(ExitCode.NO_CAPACITY, why)
        job = self._job
        job.say(f"`trainonce run --job-id {job.id} …` goes on from the checkpoint")

    def _stop(self, code: int, name: str) -> None:
        job = self._job
        job.stopping = int(code)
        self._why = name
        self._stopped_mono_s = job.clock.mono_s()
        running = job.uses_trainonce and job.all_ready
        what = "finishing the step and writing a checkpoint" if running else "ending the workers"
        job.say(f"{name}: {what} (at most {job.options.grace_s:g} s; again to end at once)")
        for handle in list(job.workers.values()):
            if handle.rank >= 0 and handle.said_hello and job.all_ready:
                handle.send(STOP)
            elif handle.rank >= 0:
                handle.process.signal_group(signal.SIGTERM)
            elif not job.membership.lost:
                self._dismiss(handle)
            # Else a rank is waiting for a spare: without it there is no checkpoint.
        job.timers.after(job.options.grace_s, self._grace_over)
        self.check_stopped()

    def note_checkpoint(self) -> None:
        """A durable checkpoint was committed."""
        self._saved_at_stop = self._saved_at_stop or bool(self._job.stopping)

    def check_stopped(self) -> None:
        """Finish a job that was told to stop once its ranked workers are gone."""
        job = self._job
        if job.stopping and not any(h.rank >= 0 for h in job.workers.values()):
            saved = "a checkpoint was written" if self._saved_at_stop else "no checkpoint written"
            self.finish(job.stopping, "interrupted", f"{self._why}; {saved}")

    def _grace_over(self) -> None:
        job = self._job
        if job.is_ending:
            return
        job.say(f"the workers did not end within {job.options.grace_s:g} s: killing them")
        self.finish(job.stopping, "interrupted", f"{self._why}; grace exceeded")

    def _give_up(self) -> None:
        for handle in self._job.workers.values():
            self._job.say(f"pid {handle.pid} cannot be reaped; leaving it behind")
            handle.fenced = True

    def _dismiss(self, handle: WorkerHandle) -> None:
        if handle.said_hello:
            self._job.dismiss(handle, leave_s=_LEAVE_S)
        else:
            # It never spoke: it cannot hear either.
            handle.dismissed = True
            handle.kill()
