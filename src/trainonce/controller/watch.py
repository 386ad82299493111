"""Reads the progress pages: how far the job is, who hangs, and what spares should know."""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING

from trainonce.controller.handle import Doom
from trainonce.controller.live import Snapshot
from trainonce.controller.pace import Pace
from trainonce.controller.policy import Action, Decision, RankStatus, judge_progress
from trainonce.events import ProgressMade
from trainonce.wire.messages import Committed, DumpCollectives
from trainonce.wire.progress import Phase

if TYPE_CHECKING:
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.controller.recovery import Recovery

# A commit that ends a pause is looked for at this grain; else the pages are read seldom.
_FINE_S = 0.002
_EARLY_S = 0.02
_COARSE_S = 0.25
# Spares rehearse what the job does in its first steps, and the order of buckets is settled
# by the third: later steps tell them nothing new.
_EARLY_STEPS = 3
_LEDGER_EVERY_S = 5.0
_STACKS_S = 0.3


class Watch:
    """Looks at the workers' pages and acts on what they show.

    Args:
        job: The job.
        recovery: Serves hangs.
    """

    def __init__(self, job: Job, recovery: Recovery) -> None:
        self._job = job
        self._recovery = recovery
        self._told_step = -1
        self._looked_s = float("-inf")
        self._recorded_s = job.clock.mono_s()
        self._step_times: deque[float] = deque(maxlen=64)
        self._pace = Pace(job)
        self.snapshot = Snapshot(
            step=0, ranks_alive=0, world_size=job.options.nproc, spares_ready=0,
            spares=job.options.spares, incidents=0,
        )  # fmt: skip

    def interval_s(self) -> float:
        """Return after how long to look again."""
        if self._job.incidents.wants_fine_time:
            return _FINE_S
        return _EARLY_S if self._job.step < _EARLY_STEPS and self._job.all_ready else _COARSE_S

    def look(self) -> bool:
        """Read the pages. Returns True when the slower look was due and taken as well."""
        job = self._job
        now = job.clock.mono_s()
        if not job.restarting:
            job.incidents.note_step(job.read_step())
        if min(job.step, _EARLY_STEPS) > self._told_step and job.all_ready:
            self.tell_spares()
        if now - self._looked_s < _COARSE_S:
            return False
        self._looked_s = now
        self._summarise()
        if job.uses_trainonce and not (job.is_ending or job.stopping or job.restarting):
            self._judge(now)
        if now - self._recorded_s >= _LEDGER_EVERY_S:
            self.record_progress()
        return True

    def tell_spares(self) -> None:
        """Tell every spare how far the job is."""
        job = self._job
        self._told_step = min(job.step, _EARLY_STEPS) if job.all_ready else -1
        for handle in job.spares():
            self.tell(handle)

    def tell(self, handle: WorkerHandle) -> None:
        """Tell one spare."""
        if handle.said_hello:
            handle.send(Committed(step=self._job.step))

    def record_progress(self) -> None:
        """Put where the job stands into the ledger."""
        self._recorded_s = self._job.clock.mono_s()
        now = self.snapshot
        self._job.record(
            ProgressMade(
                step=now.step,
                samples=now.samples,
                tokens=now.tokens,
                ranks_alive=now.ranks_alive,
                spares_ready=now.spares_ready,
                step_s=sorted(self._step_times)[len(self._step_times) // 2]
                if self._step_times else 0.0,
                loss=now.loss,
                loader_s=now.loader_s,
                device_use=self._job.device_use(),
                flops_per_step=now.flops_per_step,
                peak_flops=now.peak_flops,
            )
        )  # fmt: skip

    def _summarise(self) -> None:
        job = self._job
        pages = [(h, h.process.progress.snapshot()) for h in job.ranked()]
        if not (job.is_ending or job.stopping or job.restarting):
            self._pace.look(pages)
        self._step_times.extend(p["step_ns"] / 1e9 for _h, p in pages if p["step_ns"] > 0)
        losses = [struct.unpack("d", struct.pack("q", p["loss_bits"]))[0] for _h, p in pages]
        # A page that no worker has written yet reads 0.0.
        known = [loss for loss in losses if loss == loss and loss != 0.0]
        peaks = [p["peak_flops"] for _h, p in pages]
        self.snapshot = Snapshot(
            step=job.step,
            samples=max(sum(p["samples"] for _h, p in pages), 0),
            tokens=sum(p["tokens"] for _h, p in pages),
            flops_per_step=sum(p["flops"] for _h, p in pages),
            peak_flops=sum(peaks) if all(peaks) else 0,
            loader_s=max((p["loader_ns"] for _h, p in pages), default=0) / 1e9,
            ranks_alive=len(pages),
            world_size=job.options.nproc,
            spares_ready=sum(bool(h.parked) for h in job.spares()),
            spares=job.options.spares,
            incidents=job.incidents.total,
            guests=len(job.guests()),
            short=job.short,
            loss=sum(known) / len(known) if known else None,
            phase="training" if job.all_ready else "starting",
        )

    def _judge(self, now: float) -> None:
        job = self._job
        forming = not job.membership.is_formed
        forming_s = now - job.forming_since_s if forming and job.all_ready else None
        handles = job.ranked()
        if job.awaited or any(handle.doom is not None for handle in handles):
            return  # one hang at a time: what the others do now is its consequence
        statuses = [self._status(handle, now) for handle in handles]
        if not job.all_ready:
            # A set-up may take as long as it likes; only a stopped process is looked for.
            statuses = [s for s in statuses if s.stopped_s > 0]
        decision = judge_progress(
            statuses,
            job.options.hang,
            step_times_s=self._step_times,
            forming_s=forming_s,
            reformed=self._recovery.has_reformed(job.step),
        )
        if decision.action is Action.REPLACE:
            self._replace(decision, statuses)
        elif decision.action is Action.END:
            self._keep_evidence(decision, statuses)
            self._recovery.end_for_parted_ranks(decision.reason)
        elif decision.action is Action.REFORM:
            self._keep_evidence(decision, statuses)
            self._recovery.reform(decision.reason, detected_by="progress")

    def _status(self, handle: WorkerHandle, now: float) -> RankStatus:
        page = handle.process.progress.snapshot()
        if not handle.process.is_stopped():
            handle.stopped_since_s = None
        elif handle.stopped_since_s is None:
            handle.stopped_since_s = now
        changed_s = max(page["changed_mono_ns"] / 1e9, self._job.forming_since_s)
        promoted = handle.promoted_s is not None and handle.promoted_s >= self._job.forming_since_s
        return RankStatus(
            rank=handle.rank,
            phase=Phase(page["phase"]) if page["phase"] in list(Phase) else Phase.STARTING,
            commits=page["commits"],
            issued=page["issued"],
            pending=page["issued"] - page["completed"],
            silent_s=max(0.0, now - changed_s),
            busy_s=max(0.0, page["busy_until_mono_ns"] / 1e9 - now),
            stopped_s=now - handle.stopped_since_s if handle.stopped_since_s is not None else 0.0,
            newcomer=promoted or handle.rank in self._job.membership.newcomers,
            inside=page["section_mono_ns"] > 0,
        )

    def _replace(self, decision: Decision, statuses: list[RankStatus]) -> None:
        job = self._job
        self._keep_evidence(decision, statuses)
        for rank in decision.ranks:
            handle = job.holder(rank)
            if handle is None:
                continue
            stopped = handle.stopped_since_s is not None
            doom = Doom("hang", decision.reason, "stopped process" if stopped else "progress")
            # Unless it is stopped it can still tell where it hangs: give its stacks a moment.
            self._recovery.kill(handle, doom, delay_s=0.0 if stopped else _STACKS_S)

    def _keep_evidence(self, decision: Decision, statuses: list[RankStatus]) -> None:
        job = self._job
        name = f"hang_generation_{job.membership.generation}"
        lines = [f"{decision.action.value} ranks {list(decision.ranks)}: {decision.reason}"]
        lines += [str(status) for status in statuses]
        table = job.logs.write(f"{name}.txt", "\n".join(lines) + "\n")
        for handle in job.ranked():
            if handle.stacks_signals:
                one, every = handle.stacks_signals
                is_doomed = handle.rank in decision.ranks and decision.action is Action.REPLACE
                handle.process.signal_leader(every if is_doomed else one)
            path = table.with_name(f"{name}_rank_{handle.rank}_collectives.json").absolute()
            handle.send(DumpCollectives(path=str(path)))
