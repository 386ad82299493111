"""Empties a host or a device for maintenance: every rank on it moves to a spare elsewhere."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from trainonce.controller.slots import names_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.controller.slots import Place
    from trainonce.controller.supervisor import Supervisor


class Drain:
    """Moves what runs on a host, or on one device of it.

    Args:
        supervisor: Of the job.
        host: Whose workers have to go.
        device: Only those on this device ("gpu1"; "slot1" for the place in which rank 1 starts,
            "worker1" for one process); "" for all.
        checkpoint: Where there is no other host to go to, write a checkpoint and end the job.
    """

    def __init__(
        self, supervisor: Supervisor, host: str, device: str, *, checkpoint: bool = False
    ) -> None:
        self._supervisor = supervisor
        self._job = supervisor.job
        self._host = host
        self._device = device
        self._checkpoint = checkpoint
        self._failed: list[str] = []
        self._open = 0

    def run(self, answer: Callable[[bool, str], None]) -> None:
        """Begin; `answer` is called once, with success and a sentence."""
        job = self._job
        place = self._place
        if not any(handle.host == self._host for handle in job.workers.values()):
            hosts = ", ".join(sorted({handle.host for handle in job.workers.values()}))
            answer(False, f"no worker of job {job.id} runs on {self._host}: they run on {hosts}")
            return
        ranks = [handle.rank for handle in job.ranked() if self._is_there(handle.place)]
        if not self._device and self._checkpoint:
            self._supervisor.ending.stop(signal.SIGTERM)
            answer(True, f"job {job.id} writes a checkpoint and ends; go on with --resume {job.id}")
            return
        if not self._device and not self._elsewhere():
            answer(
                False,
                f"all workers of job {job.id} run on {self._host}, and there is no other host to"
                f" move to; `trainonce drain {self._host} --checkpoint` writes a checkpoint and"
                " ends the job, to go on elsewhere",
            )
            return
        job.slots.closed[self._key] = self._is_there
        if not ranks:
            answer(True, f"no rank of job {job.id} is on {place}")
            return
        self._open = len(ranks)
        for rank in ranks:
            self._move(rank, place, answer, len(ranks))

    def undo(self, answer: Callable[[bool, str], None]) -> None:
        """Let the job use again what was drained."""
        if self._job.slots.closed.pop(self._key, None) is None:
            answer(False, f"job {self._job.id} had no order to leave {self._place}")
        else:
            answer(True, f"job {self._job.id} may use {self._place} again")

    @property
    def _key(self) -> tuple[str, str]:
        return self._host, self._device

    @property
    def _place(self) -> str:
        return f"{self._device} of {self._host}" if self._device else self._host

    def _elsewhere(self) -> bool:
        return any(handle.host != self._host for handle in self._job.workers.values())

    def _is_there(self, place: Place) -> bool:
        if place.host != self._host:
            return False
        health = self._supervisor.health
        device = health.device_of(place) if health is not None else ""
        return not self._device or self._device in (device, *names_of(place))

    def _move(self, rank: int, place: str, answer: Callable[[bool, str], None], total: int) -> None:
        def moved(ok: bool, text: str) -> None:
            self._open -= 1
            if not ok:
                self._failed.append(text)
            if self._open == 0:
                left = "; ".join(self._failed)
                told = f"{total - len(self._failed)} of {total} ranks moved away from {place}"
                answer(not self._failed, f"{told}{f': {left}' if left else ''}")

        self._supervisor.migration.request(
            rank, moved, detail=f"{place} is drained", detected_by="drain"
        )
