"""Faults of the plan that the launcher carries out itself."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

from trainonce.events import FaultInjected
from trainonce.wire.faults import LAUNCHER_FAULTS

if TYPE_CHECKING:
    from trainonce.controller.capacity import Capacity
    from trainonce.controller.handle import WorkerHandle
    from trainonce.controller.job import Job
    from trainonce.controller.migration import Migration
    from trainonce.controller.recovery import Recovery
    from trainonce.wire.faults import Fault

_WAITING_S = 0.01
_IDLE_S = 1.0


class Chaos:
    """Carries out migrations, resets, random faults and the like once their step has come.

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
        self._random = [f for f in job.options.chaos if f.action == "random"]
        self._generators = {f.index: random.Random(f.seed) for f in self._random}
        self._due_s: dict[int, float] = {}

    def interval_s(self) -> float:
        """Return after how long to look again: soon while a fault waits for its step."""
        waiting = any(fault.index not in self._job.fired for fault in self._planned)
        return _WAITING_S if waiting else _IDLE_S

    def look(self) -> None:
        """Carry out what is due."""
        job = self._job
        if not job.all_ready or job.is_ending or job.stopping or job.restarting:
            return
        for fault in self._planned:
            if fault.index not in job.fired and job.step >= fault.step:
                self._carry_out(fault)
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
        elif fault.action == "restore":
            self._record(fault, fault.action, -1, 0)
            self._capacity.restore()
        elif fault.action == "reset" and job.membership.is_formed:
            self._record(fault, fault.action, fault.rank, 0)
            self._recovery.reform("reset by the fault plan", chaos=True)
        elif fault.action == "migrate" and job.membership.is_formed:
            self._migrate(fault, fault.rank)

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

    def _migrate(self, fault: Fault, rank: int) -> None:
        handle = self._job.holder(rank)
        if self._migration.request(rank, lambda _ok, _text: None, chaos=True):
            self._record(fault, "migrate", rank, handle.pid if handle else 0)

    def _record(self, fault: Fault, action: str, rank: int, pid: int) -> None:
        job = self._job
        job.fired.add(fault.index)
        job.record(FaultInjected(fault=action, rank=rank, step=job.step, point="", pid=pid))
