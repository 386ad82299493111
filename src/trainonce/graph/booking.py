"""Booking what stored results saved in the ledger, where `trainonce report` shows it.

Under `trainonce run` the events belong to the job. A process of its own becomes a job when it
first saves something: it holds no rank, and ends with the process.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import os
import platform
import secrets
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.events import ComputeSaved, GenerationFormed, JobEnded, JobStarted
from trainonce.ledger.energy import rated_power_w
from trainonce.ledger.store import Ledger

if TYPE_CHECKING:
    from trainonce.events import Event

_PREFIX = "compute-"


class _Book:
    """The ledger as this process writes it. One for each process: threads do not survive forks."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._ledger = Ledger.open()
        self.job = settings.JOB.get() or ""
        if self.job:
            atexit.register(self._close, None)
            return
        now = datetime.datetime.now(tz=datetime.UTC)
        self.job = f"{_PREFIX}{now:%m%d-%H%M%S}-{secrets.token_hex(2)}"
        script = sys.argv[0] if sys.argv and sys.argv[0] else "python"
        started = JobStarted(
            job=self.job,
            script=script,
            command=[script],
            world_size=0,
            spares=0,
            host=platform.node(),
            project=settings.PROJECT.get() or "default",
            wall_s=time.time(),
            mono_s=time.monotonic(),
        )
        self.append(started)
        formed = GenerationFormed(generation=1, incarnation=1, pids=[], newcomers=[], step=0)
        self.append(replace(formed, wall_s=started.wall_s, mono_s=started.mono_s))
        atexit.register(self._close, JobEnded(outcome="completed", exit_code=0, steps=0))

    def append(self, event: Event) -> None:
        self._ledger.append(self.job, event)

    def _close(self, ended: JobEnded | None) -> None:
        if os.getpid() != self.pid:
            return  # the child of a fork: the job is its parent's
        if ended is not None:
            if hasattr(sys, "last_value"):
                ended = replace(ended, outcome="failed", exit_code=1)
            self.append(ended)
        self._ledger.close(timeout_s=5.0)


@functools.cache
def _book(pid: int, home: str) -> _Book:
    return _Book()


def book(event: Event) -> None:
    """Keep an event in the ledger of `TRAINONCE_HOME`. Raises nothing and does not wait."""
    _book(os.getpid(), str(settings.home())).append(event)


def saved(
    node: str, key: str, *, seconds: float, read_s: float, threads: int = 1, gpus: int = 0
) -> ComputeSaved:
    """Return the event for the first use of a stored result.

    Args:
        node: What was not computed again.
        key: What names it, once for each job.
        seconds: What computing it took.
        read_s: What finding and reading it took.
        threads: CPU threads that computing it occupied.
        gpus: GPUs that computing it occupied.
    """
    return ComputeSaved(
        wall_s=time.time(),
        mono_s=time.monotonic(),
        node=node,
        key=key,
        saved_s=seconds,
        read_s=read_s,
        energy_j=max(0.0, seconds - read_s) * rated_power_w(threads=threads, gpus=gpus),
    )
