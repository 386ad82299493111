"""Planned moves of a rank to a spare while it trains."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.controller.policy import place_for_move, rank_spares
from trainonce.wire.messages import Drain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.incidents import OpenIncident
    from trainonce.controller.job import Job
    from trainonce.controller.policy import SpareStatus
    from trainonce.controller.recovery import Recovery
    from trainonce.events import Incident

# A worker that is started for a move may land on the very device that is to be left.
_MAX_STARTS = 4
# A successor may have died by accident; two say something about successors.
_MAX_FAILURES = 2


@dataclass(eq=False)
class _Move:
    """A request.

    `asked_in` is the membership in which its worker was told to drain: with another the order is
    void. `incident` is there from when its rank was handed over.
    """

    rank: int
    answer: Callable[[bool, str], None]
    chaos: bool
    detail: str
    detected_by: str
    asked_in: tuple[int, int] | None = None
    started: int = 0
    failures: int = 0
    incident: OpenIncident | None = None


class Migration:
    """Moves ranks on request, one at a time.

    A move that meets a death waits until all ranks are consistent, and begins anew.

    Args:
        job: The job.
        recovery: Announces the generation in which the spare holds the rank.
    """

    def __init__(self, job: Job, recovery: Recovery) -> None:
        self._job = job
        self._recovery = recovery
        self._moves: deque[_Move] = deque()
        recovery.on_taken_back = self._put_off

    def request(
        self, rank: int, answer: Callable[[bool, str], None], *, chaos: bool = False,
        detail: str = "on request", detected_by: str = "request",
    ) -> bool:  # fmt: skip
        """Move `rank` to a spare; `answer` is called once with success and a sentence.

        Returns:
            Whether the move was accepted. It may still fail.
        """
        job = self._job
        refusal = ""
        if not 0 <= rank < job.options.nproc:
            refusal = f"there is no rank {rank}: the job has ranks 0 to {job.options.nproc - 1}"
        elif not job.uses_trainonce or not job.all_ready:
            refusal = "the job has not begun its first step"
        elif job.options.nproc == 1:
            refusal = "a job of one rank has no second copy to move from"
        elif job.is_ending or job.stopping or job.done_ranks:
            refusal = "the job is ending"
        elif any(move.rank == rank for move in self._moves):
            refusal = f"rank {rank} is being moved already"
        if refusal:
            answer(False, refusal)
            return False
        self._moves.append(_Move(rank, answer, chaos, detail, detected_by))
        self.advance()
        return True

    @property
    def is_busy(self) -> bool:
        """Whether a move is under way, or asked for."""
        return bool(self._moves)

    def lacks_spare(self, rank: int) -> bool:
        """Tell whether `rank` is the next to be moved, and no spare is ready for it."""
        move = self._moves[0] if self._moves else None
        if move is None or move.rank != rank or move.incident is not None:
            return False
        return move.asked_in != self._job.membership.version

    def advance(self) -> None:
        """Begin the next move if the job is whole and a spare is parked."""
        job = self._job
        if not self._moves or not job.membership.is_formed:
            return
        if job.restarting or job.stopping or job.is_ending:
            return
        move = self._moves[0]
        handle = job.holder(move.rank)
        if handle is None or move.incident or move.asked_in == job.membership.version:
            return
        statuses = job.spare_statuses()
        if self._has_spare(statuses):
            move.asked_in = job.membership.version
            handle.send(Drain(generation=job.membership.generation))
        elif move.started < _MAX_STARTS and not any(s.fit and not s.stopped for s in statuses):
            slot = place_for_move(job.slot_statuses(), handle.slot, job.options.when_no_spare)
            if slot is None:
                self._moves.popleft()
                move.answer(False, f"rank {move.rank} stays: no device is free for it")
                return
            move.started += 1
            job.say(f"moving rank {move.rank}: no spare is ready, starting a new worker")
            job.start_worker(slot)

    def _has_spare(self, statuses: Sequence[SpareStatus]) -> bool:
        parked = {status.worker for status in statuses if status.where and status.fit}
        return any(worker in parked for worker in rank_spares(statuses))

    def handle_drained(self, handle: WorkerHandle, generation: int) -> None:
        """The worker stands at a commit: hand its rank to a spare if the others are well."""
        job = self._job
        void = generation != job.membership.generation or not job.membership.is_formed
        if void or job.restarting or job.stopping or job.is_ending:
            return  # it goes on with the next generation, or has been told to end
        move = next((each for each in self._moves if each.rank == handle.rank), None)
        ranks = [each.process for each in job.ranked()]
        well = not any(process.is_stopped() or process.dying() for process in ranks)
        if move is None or not well or not self._has_spare(job.spare_statuses()):
            self._recovery.regroup()  # the order is void with that
            return
        job.read_step()
        move.incident = job.incidents.begin(
            ranks=[move.rank], pids=[handle.pid], cause="migration", detail=move.detail,
            detected_by=move.detected_by, step=job.step, generation=job.membership.generation,
            served_by="migration", planned=True, chaos=move.chaos,
        )  # fmt: skip
        self._recovery.hand_over(handle)

    def _put_off(self, why: str) -> None:
        """The drained worker goes on, and moves later; not if successors are to blame (`why`)."""
        move = self._moves[0]
        move.incident = None
        move.failures += bool(why)
        if move.failures == _MAX_FAILURES:
            self._moves.popleft()
            move.answer(False, f"rank {move.rank} stays where it is: {why}")

    def handle_deaths(self, dead: list[WorkerHandle]) -> None:
        """A rank that dies before it is drained is rebuilt in the ordinary way."""
        for move in [m for m in self._moves if m.incident is None]:
            if any(handle.rank == move.rank for handle in dead):
                self._moves.remove(move)
                move.answer(False, f"rank {move.rank} died before it could move; it is rebuilt")

    def handle_incident(self, event: Incident, sentence: str) -> None:
        """A move is over when its incident closes."""
        move = self._moves[0] if self._moves else None
        if move and move.incident and move.incident.number == event.incident:
            self._moves.popleft().answer(event.served_by == "migration", sentence)
            self.advance()

    def abandon(self, why: str) -> None:
        """Answer every request that is still open."""
        while self._moves:
            self._moves.popleft().answer(False, why)
