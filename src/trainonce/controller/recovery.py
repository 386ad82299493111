"""What the launcher does about lost ranks: promote, wait, or connect the others again."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from trainonce.controller import oom
from trainonce.controller.ending import STOP
from trainonce.controller.exit_codes import ExitCode
from trainonce.controller.handle import Doom, Reserve
from trainonce.controller.incidents import what_happened
from trainonce.controller.policy import (
    Action,
    Death,
    is_of_the_script,
    is_out_of_memory,
    judge_death,
    rank_spares,
)  # fmt: skip
from trainonce.events import GenerationFormed

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.controller.ending import Ending
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.incidents import OpenIncident
    from trainonce.controller.job import Job
    from trainonce.controller.membership import Membership
    from trainonce.controller.policy import Decision
    from trainonce.controller.restart import Restart
    from trainonce.controller.staff import Staff
    from trainonce.wire.messages import Formed, PeerLost

# A broken connection is mostly the first sign of a death that is noticed a moment later.
_PEER_LOST_DELAY_S = 0.2
_MAX_REFORMS = 5
# A killed process that is not gone by then cannot be reaped (uninterruptible): it is fenced,
# since everything it could still reach is scoped by its generation.
_FENCE_S = 5.0
# Starting a worker takes a core for seconds: not before the step that ends the pause.
_NEW_SPARE_DELAY_S = 0.5


class Recovery:
    """Keeps every rank in the hands of a consistent worker.

    Args:
        job: The job.
        ending: Ends the job where it cannot go on.
        staff: Starts workers to give ranks to.
        restart: Starts all ranks again where there is no other way.

    Attributes:
        on_taken_back: Hears that a drained worker goes on with its rank; if its successor is to
            blame, why.
    """

    def __init__(self, job: Job, ending: Ending, staff: Staff, restart: Restart) -> None:
        self._job = job
        self._ending = ending
        self._staff = staff
        self._restart = restart
        self._oom = oom.OomCounter()
        self._reforms: tuple[int, int] = (-1, 0)
        self.on_taken_back: Callable[[str], None] = lambda _: None
        staff.serve = self.serve

    # ------------------------------------------------------------------ deaths

    def handle_deaths(self, dead: list[WorkerHandle]) -> None:
        """Serve the deaths of ranked workers, all noticed in the same instant.

        None of their code runs any more, and what they had sent is read.
        """
        job = self._job
        job.read_step()
        incidents = self._open_incidents(dead)
        verdicts = [self._judge(handle) for handle in dead]
        bugs = [verdict for verdict in verdicts if verdict.action is Action.END]
        job.membership = job.membership.lose(handle.rank for handle in dead)
        job.done_ranks -= {handle.rank for handle in dead}
        if not job.uses_trainonce:
            self._restart_plain_script(incidents)
        elif bugs:
            self._end_for_a_bug(bugs[-1].reason, dead)
        elif job.all_ready:
            self.serve()
        else:
            self._restart.run("restart", "a rank died before all had finished their set-up")
        self._explain_kills(incidents)

    def _open_incidents(self, dead: list[WorkerHandle]) -> list[OpenIncident]:
        """Open an incident for all deaths that are alike."""
        job = self._job
        alike: dict[tuple[str, str, str, bool], list[WorkerHandle]] = defaultdict(list)
        for handle in dead:
            alike[(*describe(handle), _is_chaos(handle))].append(handle)
        return [
            job.incidents.begin(
                ranks=sorted(handle.rank for handle in handles),
                pids=[handle.pid for handle in handles], cause=cause, detail=detail,
                detected_by=detected_by, step=job.step, generation=job.membership.generation,
                chaos=chaos,
                last_sign_mono_s=max(h.process.progress["changed_mono_ns"] for h in handles) / 1e9,
            )
            for (cause, detail, detected_by, chaos), handles in alike.items()
        ]  # fmt: skip

    def _judge(self, handle: WorkerHandle) -> Decision:
        """Decide whether the end of a ranked worker is one to recover from."""
        job = self._job
        cause, detail, _ = describe(handle)
        job.deaths.append(
            Death(
                rank=handle.rank,
                step=handle.process.progress["commits"] if job.all_ready else -1,
                cause=cause,
                detail=detail,
                chaos=_is_chaos(handle),
                signum=handle.ended.signum if handle.ended and not handle.doom else 0,
                crowded=self._was_crowded(handle, detail),
            )
        )
        return judge_death(job.deaths, job.options.nproc)

    def handle_spare_death(self, handle: WorkerHandle) -> None:
        """Replace a spare that died; give up when spares keep dying before they are parked."""
        lost = self._job.membership.lost
        crowded = self._was_crowded(handle, describe(handle)[1])
        if not self._staff.lose_spare(handle, crowded=crowded):
            if lost:
                self._restart.run("checkpoint", "no spare can be started")
        elif lost:
            self.serve()
        else:
            self._staff.keep_spares()

    def kill(self, handle: WorkerHandle, doom: Doom, *, delay_s: float = 0.0) -> None:
        """Kill a worker, after `delay_s`; its end is served when it is noticed."""
        if handle.doom is not None:
            return
        handle.doom = doom
        self._job.timers.after(delay_s, handle.kill)
        self._job.timers.after(delay_s + _FENCE_S, lambda: self._fence(handle))

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
        self._staff.stop_sharing(detail)
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
        if self._restart.is_used_up:
            what = what_happened(incidents[0])
            self._ending.finish(
                ExitCode.SCRIPT_FAILED,
                "failed",
                f"{what}, and --max-restarts is {job.max_restarts}",
            )
        else:
            self._restart.run("restart", "a rank failed")

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
            if incident.detail == "SIGKILL" and self._oom.has_grown() and not incident.chaos:
                incident.cause = "oom"

    # ------------------------------------------------------------------ generations

    def serve(self) -> None:
        """Give every lost rank to a spare and announce it; wait where there are too few."""
        job = self._job
        if not job.membership.lost or job.is_ending or job.restarting:
            return
        self._take_back()
        lost = sorted(job.membership.lost)
        if not job.membership.survivors:
            self._restart.run("checkpoint", "no rank with a living copy is left")
            return
        able = rank_spares(job.spare_statuses())
        if len(able) < len(lost):
            self._staff.find_holders(len(lost))
            return
        self._promote(dict(zip(lost, able, strict=False)))

    def hand_over(self, handle: WorkerHandle) -> None:
        """Give the rank of a worker that stands at a commit to the best spare; there must be one.

        Until that is consistent the worker stays. If anybody dies meanwhile, it goes on.
        """
        job, rank = self._job, handle.rank
        job.membership = job.membership.lose([rank])
        handle.rank, handle.dismissed = -1, True
        job.reserve = Reserve(rank, handle)
        self._promote({rank: rank_spares(job.spare_statuses())[0]})

    def _take_back(self, why: str = "") -> bool:
        """Let the drained worker of a move under way, if it lives, go on with its rank.

        Args:
            why: Its successor is to blame, and for what.
        """
        job, reserve = self._job, self._job.reserve
        job.reserve = None
        if reserve is None or not reserve.handle.lives or job.stopping or job.is_ending:
            return False
        rank = reserve.rank
        successor = job.holder(rank)
        if successor is None:
            why = "its successor died"
        else:  # not consistent: it has done nothing yet
            successor.rank, successor.dismissed = -1, True
            successor.kill()
        reserve.handle.rank, reserve.handle.dismissed = rank, False
        job.membership = job.membership.take_back(rank, reserve.handle.worker)
        job.incidents.note_taken_back(rank)
        self.on_taken_back(why)
        return True

    def regroup(self) -> None:
        """Announce a generation with the same members."""
        self._announce({})

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
            self._restart.run("checkpoint", f"the ranks cannot be connected: {detail}")
        else:
            self.regroup()

    def has_reformed(self, step: int) -> bool:
        """Tell whether the ranks were connected again in this step."""
        return self._reforms[0] == step

    def end_for_parted_ranks(self, reason: str) -> None:
        """End a job whose ranks took different ways through the script."""
        self._ending.finish(ExitCode.SCRIPT_FAILED, "failed", reason.replace("\n", "; "))

    def handle_peer_lost(self, report: PeerLost) -> None:
        """A collective failed: wait for the death behind it, else connect again."""
        membership = self._job.membership
        if report.generation == membership.generation:
            self._job.timers.after(
                _PEER_LOST_DELAY_S, lambda: self._reform_if_unexplained(membership, report.error)
            )

    def handle_formed(self, handle: WorkerHandle, report: Formed) -> None:
        """A worker stands in a generation, or could not be made consistent."""
        job = self._job
        if report.generation != job.membership.generation or handle.rank in job.membership.lost:
            return
        if report.parted:
            self.end_for_parted_ranks(report.error)
            return
        if report.error:
            why = "; ".join(report.error.splitlines())
            if self._take_back(why):
                self.regroup()
                return
            self._restart.run(
                "checkpoint", f"rank {handle.rank} cannot be rebuilt from living copies ({why})"
            )
            return
        newcomer = handle.rank in job.membership.newcomers
        job.incidents.note_formed(report, rank=handle.rank, newcomer=newcomer)
        self.join(handle.rank)

    def join(self, rank: int) -> None:
        """Note that `rank` stands in the current generation."""
        job = self._job
        was_formed = job.membership.is_formed
        job.membership = job.membership.join(rank, job.membership.generation)
        if job.reserve is not None and job.reserve.rank == rank:
            job.dismiss(job.reserve.handle)
            job.reserve = None
        if job.membership.is_formed and not was_formed:
            self._formed()

    def _promote(self, replacements: dict[int, int]) -> None:
        job = self._job
        for rank, worker in replacements.items():
            job.workers[worker].rank = rank
            job.workers[worker].promoted_s = job.clock.mono_s()
        self._announce(replacements)

    def _announce(self, replacements: dict[int, int]) -> None:
        job = self._job
        job.membership = job.membership.succeed(replacements)
        job.short = 0
        job.incidents.give_to_guests(job.guests().keys())
        for rank in job.membership.ranks:
            job.send_generation(rank)
        if self._staff.leaves and not job.stopping:
            self._ending.leave("there is no device for every rank")
        elif job.stopping:
            for rank in job.membership.newcomers:
                job.workers[job.membership.workers[rank]].send(STOP)
        job.forming_since_s = job.clock.mono_s()
        job.incidents.announce()

    def _formed(self) -> None:
        job = self._job
        membership = job.membership
        # Not by the number of the generation: the ranks may have been connected again since.
        restarted, job.restarted = job.restarted, False
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
        job.on_formed()
        job.timers.after(_NEW_SPARE_DELAY_S, self._staff.keep_spares)

    def _reform_if_unexplained(self, before: Membership, error: str) -> None:
        job = self._job
        now = job.membership
        busy = now.lost or job.restarting or job.is_ending or job.stopping
        # After a start of all ranks, generations are counted anew.
        same = (now.incarnation, now.generation) == (before.incarnation, before.generation)
        if same and not busy:
            self.reform(error)


def describe(handle: WorkerHandle) -> tuple[str, str, str]:
    """Return cause, detail and means of detection of a worker's end."""
    if handle.doom is not None:
        return handle.doom.cause, handle.doom.detail, handle.doom.detected_by
    if handle.failed is not None:
        detail = f"{handle.failed.error_type}: {handle.failed.error}"
        return handle.failed.cause, detail, "process exit"
    if handle.ended is not None and handle.ended.signum:
        return "signal", str(handle.ended), "process exit"
    return "exit", str(handle.ended), "process exit"


def _is_chaos(handle: WorkerHandle) -> bool:
    return bool(handle.chaos or handle.firing)
