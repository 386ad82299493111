"""What the launcher does about lost ranks: promote, wait, re-form, or start all again."""

from __future__ import annotations

import signal
from collections import defaultdict
from typing import TYPE_CHECKING

from trainonce.controller import oom
from trainonce.controller.ending import STOP
from trainonce.controller.exit_codes import ExitCode
from trainonce.controller.incidents import what_happened
from trainonce.controller.job import Doom
from trainonce.controller.policy import (
    Action,
    Death,
    WhenNoSpare,
    find_room,
    is_of_the_script,
    is_out_of_memory,
    judge_death,
    place_ranks,
    rank_spares,
)  # fmt: skip
from trainonce.events import GenerationFormed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.controller.ending import Ending
    from trainonce.controller.incidents import OpenIncident
    from trainonce.controller.job import Job, WorkerHandle
    from trainonce.controller.policy import Room
    from trainonce.wire.messages import Formed, PeerLost

# A broken connection is mostly the first sign of a death that is noticed a moment later.
_PEER_LOST_DELAY_S = 0.2
_MAX_REFORMS = 5
_MAX_SPARE_DEATHS = 3
# A killed process that is not gone by then cannot be reaped (uninterruptible): it is fenced,
# since everything it could still reach is scoped by its generation.
_FENCE_S = 5.0
# Starting a worker takes a core for seconds: not before the step that ends the pause.
_NEW_SPARE_DELAY_S = 0.5
_PREPARING_S = 0.1
_LOOK_FOR_ROOM_S = 1.0


class Recovery:
    """Keeps every rank in the hands of a consistent worker.

    Args:
        job: The job.
        ending: Ends the job where it cannot go on.
    """

    def __init__(self, job: Job, ending: Ending) -> None:
        self._job = job
        self._ending = ending
        self._oom = oom.OomCounter()
        self._restarts = 0
        self._restarted_at = -1
        self._spare_deaths = 0
        self._reforms: tuple[int, int] = (-1, 0)
        self._start_is_due = False
        self._room_is_looked_for = False
        self._guests_fit = True
        self._leave = False

    # ------------------------------------------------------------------ deaths

    def handle_deaths(self, dead: list[WorkerHandle]) -> None:
        """Serve the deaths of ranked workers, all noticed in the same instant.

        The workers are reaped, and what they had sent is read.
        """
        job = self._job
        job.read_step()
        groups: dict[tuple[str, str, str, bool], list[WorkerHandle]] = defaultdict(list)
        for handle in dead:
            cause, detail, detected_by = describe(handle)
            chaos = bool(handle.chaos or handle.firing)
            groups[cause, detail, detected_by, chaos].append(handle)
        incidents: list[OpenIncident] = []
        decision = None
        for (cause, detail, detected_by, chaos), handles in groups.items():
            ranks = sorted(handle.rank for handle in handles)
            last_sign_ns = max(h.process.progress["changed_mono_ns"] for h in handles)
            incidents.append(
                job.incidents.begin(
                    ranks=ranks, pids=[handle.pid for handle in handles], cause=cause,
                    detail=detail, detected_by=detected_by, step=job.step,
                    generation=job.membership.generation, chaos=chaos,
                    last_sign_mono_s=last_sign_ns / 1e9,
                )
            )  # fmt: skip
            for handle in handles:
                step = handle.process.progress["commits"] if job.all_ready else -1
                signum = handle.ended.signum if handle.ended and not handle.doom else 0
                job.deaths.append(
                    Death(rank=handle.rank, step=step, cause=cause, detail=detail, chaos=chaos,
                          signum=signum, crowded=self._was_crowded(handle, detail))
                )  # fmt: skip
                verdict = judge_death(job.deaths, job.options.nproc)
                decision = verdict if verdict.action is Action.END else decision
        job.membership = job.membership.lose(handle.rank for handle in dead)
        job.done_ranks -= {handle.rank for handle in dead}
        if not job.uses_trainonce:
            self._restart_plain_script(incidents)
        elif decision is not None:
            self._end_for_a_bug(decision.reason, dead)
        elif job.all_ready:
            self.serve()
        else:
            self.restart_all("restart", "a rank died before all had finished their set-up")
        self._explain_kills(incidents)

    def handle_spare_death(self, handle: WorkerHandle) -> None:
        """Replace a spare that died; give up when spares keep dying before they are parked."""
        job = self._job
        if not self._was_crowded(handle, describe(handle)[1]):
            self._spare_deaths = 0 if handle.parked else self._spare_deaths + 1
        if handle.failed is not None:
            job.logs.write(f"spare{handle.worker}-traceback.txt", handle.failed.traceback)
        job.say(f"spare {handle.worker} (pid {handle.pid}) ended with {handle.ended}")
        if self._spare_deaths >= _MAX_SPARE_DEATHS:
            job.say(
                f"{_MAX_SPARE_DEATHS} spares in a row ended before they were ready: no more are"
                f" kept (logs in {job.logs.folder})",
                once="spares",
            )
            if job.membership.lost:
                self.restart_all("checkpoint", "no spare can be started")
            return
        if job.membership.lost:
            self.serve()
        else:
            self.keep_spares()

    def kill(self, handle: WorkerHandle, doom: Doom, *, delay_s: float = 0.0) -> None:
        """Kill a worker, after `delay_s`; its end is served when it is noticed."""
        if handle.doom is not None:
            return
        handle.doom = doom
        self._job.timers.after(delay_s, lambda: self._kill(handle))
        self._job.timers.after(delay_s + _FENCE_S, lambda: self._fence(handle))

    def _kill(self, handle: WorkerHandle) -> None:
        if handle.ended is None:
            handle.process.signal_group(signal.SIGKILL)

    def _fence(self, handle: WorkerHandle) -> None:
        if handle.ended is None and self._job.membership.rank_of(handle.worker) is not None:
            self._job.say(f"pid {handle.pid} cannot be reaped; going on without it")
            self.handle_deaths([handle])
            handle.rank, handle.dismissed, handle.fenced = -1, True, True

    def _was_crowded(self, handle: WorkerHandle, detail: str) -> bool:
        """Tell whether a worker lacked memory because it shared a device; then nobody shall again.

        The guests leave, and their ranks wait for room.
        """
        job = self._job
        others = [each for each in job.workers.values() if each.slot == handle.slot and each.lives]
        if not others or not is_out_of_memory(detail):
            return False
        if self._guests_fit:
            job.say(
                f"a device does not hold two workers ({detail}): no rank is given to a guest any"
                " more; lost ranks wait for a device"
            )
        self._guests_fit = False
        guests = job.guests()
        doom = Doom("oom", "a guest that its device does not hold", "process exit")
        for each in job.ranked():
            if each.rank in guests and each.lives:
                self.kill(each, doom)
        return True

    def _restart_plain_script(self, incidents: list[OpenIncident]) -> None:
        job = self._job
        job.say(
            "this script does not call trainonce.init(): all ranks are restarted when one fails,"
            " from the script's own checkpoints at best",
            once="plain",
        )
        if self._restarts >= job.max_restarts:
            what = what_happened(incidents[0])
            self._ending.finish(
                ExitCode.SCRIPT_FAILED,
                "failed",
                f"{what}, and --max-restarts is {job.max_restarts}",
            )
        else:
            self.restart_all("restart", "a rank failed")

    def _end_for_a_bug(self, reason: str, dead: list[WorkerHandle]) -> None:
        tracebacks = [handle.failed.traceback for handle in dead if handle.failed]
        of_script = any(is_of_the_script(death) for death in self._job.deaths[-len(dead) :])
        if tracebacks:
            self._job.say(tracebacks[-1].rstrip())
        self._ending.finish(
            ExitCode.SCRIPT_FAILED if of_script else ExitCode.NOT_RECOVERED,
            "failed",
            f"{reason}: a bug, not a failure" if of_script else reason,
        )

    def _explain_kills(self, incidents: list[OpenIncident]) -> None:
        # After the announcement: reading the kernel's counters is not for the urgent path.
        for incident in incidents:
            if incident.detail == "SIGKILL" and self._oom.has_grown():
                incident.cause = "oom"

    # ------------------------------------------------------------------ generations

    def serve(self) -> None:
        """Give every lost rank to a spare and announce it; wait where there are too few."""
        job = self._job
        lost = sorted(job.membership.lost)
        if not lost or job.is_ending or job.restarting:
            return
        if not job.membership.survivors:
            self.restart_all("checkpoint", "no rank with a living copy is left")
            return
        able = rank_spares(job.spare_statuses())
        if len(able) < len(lost):
            self._find_workers(len(lost))
            return
        replacements = dict(zip(lost, able, strict=False))
        for rank, worker in replacements.items():
            job.workers[worker].rank = rank
            job.workers[worker].promoted_s = job.clock.mono_s()
        self._announce(replacements)

    def reform(self, detail: str, *, chaos: bool = False, detected_by: str = "collective") -> None:
        """Announce a generation with the same members: only the connections are new."""
        job = self._job
        job.read_step()
        step, times = self._reforms
        times = times + 1 if step == job.step else 1
        self._reforms = (job.step, times)
        job.incidents.begin(
            ranks=[], pids=[], cause="connection", detail=detail, detected_by=detected_by,
            step=job.step, generation=job.membership.generation, served_by="reform", chaos=chaos,
        )  # fmt: skip
        if times > _MAX_REFORMS and not chaos:
            self.restart_all("checkpoint", f"the ranks cannot be connected: {detail}")
        else:
            self._announce({})

    def handle_peer_lost(self, report: PeerLost) -> None:
        """A collective failed: wait for the death behind it, else connect again."""
        generation = report.generation
        if generation == self._job.membership.generation:
            self._job.timers.after(
                _PEER_LOST_DELAY_S, lambda: self._reform_if_unexplained(generation, report.error)
            )

    def handle_formed(self, handle: WorkerHandle, report: Formed) -> None:
        """A worker stands in a generation, or could not be made consistent."""
        job = self._job
        if report.generation != job.membership.generation or handle.rank in job.membership.lost:
            return
        if report.error:
            job.say(f"rank {handle.rank} cannot be rebuilt from living copies: {report.error}")
            self.restart_all("checkpoint", report.error)
            return
        newcomer = handle.rank in job.membership.newcomers
        job.incidents.note_formed(report, rank=handle.rank, newcomer=newcomer)
        self.join(handle.rank)

    def join(self, rank: int) -> None:
        """Note that `rank` stands in the current generation."""
        job = self._job
        was_formed = job.membership.is_formed
        job.membership = job.membership.join(rank, job.membership.generation)
        if job.membership.is_formed and not was_formed:
            self._formed()

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

    def _announce(self, replacements: dict[int, int]) -> None:
        job = self._job
        job.membership = job.membership.succeed(replacements)
        job.short = 0
        job.incidents.give_to_guests(job.guests().keys())
        for rank in job.membership.ranks:
            job.send_generation(rank)
        if self._leave and not job.stopping:
            self._ending.leave("there is no device for every rank")
        elif job.stopping:
            for rank in job.membership.newcomers:
                job.workers[job.membership.workers[rank]].send(STOP)
        job.forming_since_s = job.clock.mono_s()
        job.incidents.announce()

    def _formed(self) -> None:
        job = self._job
        membership = job.membership
        restarted = membership.generation == 1 and membership.incarnation > 0
        at = min(handle.process.progress["commits"] for handle in job.ranked())
        job.incidents.recovered(
            restarted_at=at if restarted else None, from_shadow=job.resumed == "shadow"
        )
        job.record(
            GenerationFormed(
                generation=membership.generation,
                incarnation=membership.incarnation,
                pids=[handle.pid for handle in job.ranked()],
                newcomers=sorted(
                    h.rank for h in job.ranked()
                    if h.promoted_s is not None and h.promoted_s >= job.forming_since_s
                ),
                step=max(at, job.step if not restarted else 0),
            )
        )  # fmt: skip
        job.timers.after(_NEW_SPARE_DELAY_S, self.keep_spares)

    def _find_workers(self, wanted: int) -> None:
        """Start what is missing of `wanted` workers where there is room, or wait for room."""
        job = self._job
        coming = sum(not status.stopped for status in job.spare_statuses())
        room = find_room(max(0, wanted - coming), job.slot_statuses(), self._when_no_spare)
        if job.incidents.wait_for_spare() or room.short != job.short:
            incidents = job.incidents.open
            happened = f"{what_happened(incidents[-1])}; " if incidents else ""
            job.say(f"{happened}no spare is ready, {_what_is_done(room)}")
        job.short = room.short
        self._leave = self._leave or room.leave
        if room.short and job.options.when_no_spare is WhenNoSpare.CHECKPOINT:
            self._end_for_want_of_room()
        else:
            self._start(room.slots)

    @property
    def _when_no_spare(self) -> WhenNoSpare:
        job = self._job
        if job.stopping and self._guests_fit:
            return WhenNoSpare.CHECKPOINT  # what was asked for cannot be had otherwise
        if self._guests_fit:
            return job.options.when_no_spare
        return WhenNoSpare.WAIT

    def _reform_if_unexplained(self, generation: int, error: str) -> None:
        job = self._job
        busy = job.membership.lost or job.restarting or job.is_ending or job.stopping
        if generation == job.membership.generation and not busy:
            self.reform(error)

    # ------------------------------------------------------------------ restarts

    def begin(self, slots: Sequence[int]) -> None:
        """Start a worker for every rank; the first generation is the membership from then on.

        Args:
            slots: Where, by rank.
        """
        job = self._job
        job.resume_from = job.find_resume()
        workers = tuple(job.start_worker(slot, rank).worker for rank, slot in enumerate(slots))
        job.membership = type(job.membership)(
            workers=workers, incarnation=job.membership.incarnation
        )
        job.forming_since_s = job.clock.mono_s()

    def restart_all(self, served_by: str, why: str) -> None:
        """End every ranked worker, and start all again from the last durable checkpoint."""
        job = self._job
        if job.restarting or job.is_ending:
            return
        if job.has_shadows and job.step > self._restarted_at:
            self._restarts = 0  # nothing is lost by one, and the job gets on between them
        self._restarted_at = job.step
        if self._restarts >= job.max_restarts:
            self._ending.finish(
                ExitCode.NOT_RECOVERED,
                "lost",
                f"{why}, and {self._restarts} restarts were used up (--max-restarts)",
            )
            return
        self._restarts += 1
        job.restarting = True
        resume = job.find_resume()
        if served_by == "checkpoint" and not resume:
            served_by = "restart"
        job.incidents.announce(served_by)
        source = f"from {resume}" if resume else "from the beginning"
        if job.has_shadows:
            source = "from the shadows of their state"
        job.say(f"{why}: starting all ranks again, {source}")
        spares = job.spares()
        usable = sum(status.usable for status in job.slot_statuses())
        too_many = max(0, job.options.nproc + len(spares) - usable)
        for handle in (*job.ranked(), *spares[:too_many]):
            handle.dismissed = True
            handle.process.signal_group(signal.SIGKILL)
        self.continue_restart()

    def continue_restart(self) -> None:
        """Start the new incarnation once every worker of the old one is reaped."""
        job = self._job
        leaving = any(h.rank >= 0 or (h.dismissed and h.lives) for h in job.workers.values())
        if not job.restarting or job.is_ending or leaving:
            return
        slots = place_ranks(job.options.nproc, job.slot_statuses(), self._when_no_spare)
        if not slots:
            self._wait_for_room()
            return
        job.short = 0
        job.restarting = False
        job.all_ready = False
        job.step = 0
        job.done_ranks.clear()
        job.drop_mirrors()
        if not job.uses_trainonce:
            # Keys of ours are scoped by incarnation; those of a plain script are not.
            job.store.renew()
        job.membership = job.membership.restart(job.membership.workers)
        self.begin(slots)
        job.incidents.give_to_guests(job.guests().keys())

    def _wait_for_room(self) -> None:
        job = self._job
        usable = sum(status.usable and not status.workers for status in job.slot_statuses())
        job.short = max(1, job.options.nproc - usable)
        if job.options.when_no_spare is WhenNoSpare.CHECKPOINT:
            self._end_for_want_of_room()
        else:
            job.say(
                f"waiting for {job.short} devices, to start all ranks again",
                once=f"no room {job.membership.incarnation}",
            )

    def _end_for_want_of_room(self) -> None:
        job = self._job
        self._ending.finish(
            ExitCode.NO_CAPACITY,
            "interrupted",
            f"there is no device for {job.short} of {job.options.nproc} ranks; no checkpoint of"
            " the last step could be written",
        )


def _what_is_done(room: Room) -> str:
    if room.short:
        return f"and no device is left for {room.short} rank(s): waiting until one is free again"
    if room.leave:
        return "and no device is left: a guest on another's finishes the step, then a checkpoint"
    if room.shared:
        return "and no device is left: starting a guest on another's; steps take longer"
    return "starting a new worker" if room.slots else "waiting for a spare to start"


def describe(handle: WorkerHandle) -> tuple[str, str, str]:
    """Return cause, detail and means of detection of a worker's end."""
    if handle.doom is not None:
        return handle.doom.cause, handle.doom.detail, handle.doom.detected_by
    if handle.failed is not None:
        return "exception", f"{handle.failed.error_type}: {handle.failed.error}", "process exit"
    if handle.ended is not None and handle.ended.signum:
        return "signal", str(handle.ended), "process exit"
    return "exit", str(handle.ended), "process exit"
