"""Faults of the plan that the launcher carries out."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

from trainonce.events import FaultInjected
from trainonce.wire.faults import AWAITED_FAULTS, LAUNCHER_FAULTS
from trainonce.wire.messages import Begin

if TYPE_CHECKING:
    from trainonce.controller.capacity import Capacity
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.controller.migration import Migration
    from trainonce.controller.recovery import Recovery
    from trainonce.wire.faults import Fault

_WAITING_S = 0.01
_IDLE_S = 1.0
# How long a rank that is to be moved waits for a spare that is not ready.
_SPARE_COMES_S = 20.0


class Chaos:
    """Carries out what ranks wait for, what is due once its step has come, and random faults.

    Args:
        job: The job.
        recovery: Carries out resets.
        migration: Carries out migrations.
        capacity: Gives lost devices back.
    """

    def __init__(
        self, job: Job, recovery: Recovery, migration: Migration, capacity: Capacity
    ) -> None:
        self._job = job
        self._recovery = recovery
        self._migration = migration
        self._capacity = capacity
        self._planned = [f for f in job.options.chaos if f.action in LAUNCHER_FAULTS]
        self._awaited = {f.index: f for f in job.options.chaos if f.action in AWAITED_FAULTS}
        self._refused: list[Fault] = []
        self._since_s: dict[int, float] = {}
        self._random = [f for f in job.options.chaos if f.action == "random"]
        self._generators = {f.index: random.Random(f.seed) for f in self._random}
        self._due_s: dict[int, float] = {}

    def interval_s(self) -> float:
        """Return after how long to look again: soon while a fault waits for its step."""
        waiting = any(
            fault.index not in self._job.fired for fault in (*self._planned, *self._refused)
        )
        return _WAITING_S if waiting else _IDLE_S

    def look(self) -> None:
        """Carry out what is due."""
        job = self._job
        if not job.all_ready or job.is_ending or job.stopping or job.restarting:
            for index in list(job.awaited):
                self._let_go(index)
            return
        for fault in self._planned:
            if fault.index not in job.fired and job.step >= fault.step:
                self._carry_out(fault)
        for fault in [fault for fault in self._refused if job.membership.is_formed]:
            self._refused.remove(fault)
            self._carry_out_awaited(fault)
        for index in list(job.awaited):
            self._serve_awaited(self._awaited[index])
        for fault in self._random:
            self._random_fault(fault)

    def _carry_out(self, fault: Fault) -> None:
        """Carry out `fault`, unless it has to wait for its occasion."""
        job = self._job
        spares = [handle for handle in job.spares() if handle.parked]
        if fault.action == "kill_launcher":
            self._record(fault, fault.action, -1, os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "kill_spare" and spares:
            self._hit(fault, fault.action, spares[0])

    def _serve_awaited(self, fault: Fault) -> None:
        """Carry out what a rank waits for, unless ranks are being rebuilt; then let it go on."""
        job = self._job
        if fault.index not in job.fired and fault not in self._refused:
            if not job.membership.is_formed:
                return
            self._carry_out_awaited(fault)
        # A move that begins later would be one in another step, or after the last.
        since_s = self._since_s.setdefault(fault.index, job.clock.mono_s())
        stays = job.step > 0 and job.clock.mono_s() < since_s + _SPARE_COMES_S
        if not (stays and fault.action == "migrate" and self._migration.lacks_spare(fault.rank)):
            self._let_go(fault.index)

    def _carry_out_awaited(self, fault: Fault) -> None:
        self._job.read_step()
        if fault.action == "restore":
            self._record(fault, fault.action, -1, 0)
            self._capacity.restore()
        elif fault.action == "reset":
            self._record(fault, fault.action, fault.rank, 0)
            self._recovery.reform("reset by the fault plan", chaos=True)
        elif not self._migrate(fault, fault.rank):
            self._refused.append(fault)  # mostly since the rank is being moved already

    def _let_go(self, index: int) -> None:
        self._job.awaited.pop(index).send(Begin())

    def _random_fault(self, fault: Fault) -> None:
        job = self._job
        generator = self._generators[fault.index]
        now = job.clock.mono_s()
        due_s = self._due_s.setdefault(fault.index, now + generator.expovariate(1 / fault.every_s))
        # Never while ranks are being rebuilt: with few ranks that takes the last living copy,
        # and the plan is to test recovery, not restarts.
        if now < due_s or not job.membership.is_formed or job.step < fault.step:
            return
        self._due_s[fault.index] = now + generator.expovariate(1 / fault.every_s)
        action = generator.choice(("kill", "stop", "migrate", "kill_spare"))
        rank = generator.randrange(job.options.nproc)
        if action == "migrate":
            self._migrate(fault, rank)
            return
        spares = job.spares()
        handle = spares[0] if action == "kill_spare" and spares else job.holder(rank)
        if handle is None:
            return
        if action == "kill_spare" and not spares:
            action = "kill"
        self._hit(fault, action, handle)

    def _hit(self, fault: Fault, action: str, handle: WorkerHandle) -> None:
        self._record(fault, action, handle.rank, handle.pid)
        handle.chaos = action
        handle.process.signal_group(signal.SIGSTOP if action == "stop" else signal.SIGKILL)

    def _migrate(self, fault: Fault, rank: int) -> bool:
        handle = self._job.holder(rank)
        accepted = self._migration.request(rank, lambda _ok, _text: None, chaos=True)
        if accepted:
            self._record(fault, "migrate", rank, handle.pid if handle else 0)
        return accepted

    def _record(self, fault: Fault, action: str, rank: int, pid: int) -> None:
        job = self._job
        job.fired.add(fault.index)
        job.record(FaultInjected(fault=action, rank=rank, step=job.step, point="", pid=pid))
