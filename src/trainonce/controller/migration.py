"""Planned moves of a rank to a spare while it trains."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.controller.policy import place_for_move, rank_spares
from trainonce.wire.messages import Drain

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.controller.recovery import Recovery
    from trainonce.events import Incident

# A worker that is started for a move may land on the very device that is to be left.
_MAX_STARTS = 4


@dataclass(eq=False)
class _Move:
    rank: int
    answer: Callable[[bool, str], None]
    chaos: bool
    detail: str
    detected_by: str
    worker: int = -1
    started: int = 0
    served: bool = False


class Migration:
    """Moves ranks on request, one at a time.

    Args:
        job: The job.
        recovery: Announces the generation in which the spare holds the rank.
    """

    def __init__(self, job: Job, recovery: Recovery) -> None:
        self._job = job
        self._recovery = recovery
        self._moves: deque[_Move] = deque()

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
        return bool(self._moves) and self._moves[0].rank == rank and self._moves[0].worker < 0

    def advance(self) -> None:
        """Begin the next move if the job is whole and a spare is parked."""
        job = self._job
        if not self._moves or not job.membership.is_formed:
            return
        if job.restarting or job.stopping or job.is_ending:
            return
        move = self._moves[0]
        handle = job.holder(move.rank)
        if handle is None or handle.worker == move.worker or move.served:
            return
        statuses = job.spare_statuses()
        parked = {status.worker for status in statuses if status.where and status.fit}
        if any(worker in parked for worker in rank_spares(statuses)):
            move.worker = handle.worker
            handle.send(Drain())
        elif move.started < _MAX_STARTS and not any(s.fit and not s.stopped for s in statuses):
            slot = place_for_move(job.slot_statuses(), handle.slot, job.options.when_no_spare)
            if slot is None:
                self._moves.popleft()
                move.answer(False, f"rank {move.rank} stays: no device is free for it")
                return
            move.started += 1
            job.say(f"moving rank {move.rank}: no spare is ready, starting a new worker")
            job.start_worker(slot)

    def handle_drained(self, handle: WorkerHandle) -> None:
        """The worker stands at a commit and does nothing more: hand its rank to a spare."""
        job = self._job
        if not self._moves or self._moves[0].worker != handle.worker:
            return
        move = self._moves[0]
        move.served = True
        job.read_step()
        job.incidents.begin(
            ranks=[move.rank], pids=[handle.pid], cause="migration", detail=move.detail,
            detected_by=move.detected_by, step=job.step, generation=job.membership.generation,
            served_by="migration", planned=True, chaos=move.chaos,
        )  # fmt: skip
        job.membership = job.membership.lose([move.rank])
        handle.rank, handle.dismissed = -1, True
        self._recovery.serve()
        job.dismiss(handle)

    def handle_deaths(self, dead: list[WorkerHandle]) -> None:
        """A rank that dies before it is drained is rebuilt in the ordinary way."""
        for move in [m for m in self._moves if not m.served]:
            if any(handle.rank == move.rank for handle in dead):
                self._moves.remove(move)
                move.answer(False, f"rank {move.rank} died before it could move; it is rebuilt")

    def handle_incident(self, event: Incident, sentence: str) -> None:
        """A move is over when its incident closes."""
        if event.cause == "migration" and self._moves and self._moves[0].served:
            self._moves.popleft().answer(event.served_by == "migration", sentence)
            self.advance()

    def abandon(self, why: str) -> None:
        """Answer every request that is still open."""
        while self._moves:
            self._moves.popleft().answer(False, why)
