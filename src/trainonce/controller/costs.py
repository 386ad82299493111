"""What the job uses while it runs: energy into the ledger, and an alert as a budget is crossed."""

from __future__ import annotations

import queue
import signal
import threading
from typing import TYPE_CHECKING

from trainonce.ledger.budget import BudgetWatch, post
from trainonce.ledger.energy import EnergyLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trainonce.controller.ending import Ending
    from trainonce.controller.job import Job
    from trainonce.events import BudgetCrossed, EnergyUsed
    from trainonce.ledger.energy import Meter
    from trainonce.ledger.prices import EconomicsSettings

_LOOK_S = 1.0
_SAMPLE_S = 30.0
# How long the end of a job waits for the last reading, and for webhooks.
_LAST_WORD_S = 2.0
_J_PER_KWH = 3.6e6


class EnergyThread:
    """Reads a meter on a thread of its own: a driver that hangs must not hold up a job.

    Args:
        open_meter: Finds a meter, or None where nothing measures here.
        every_s: Time between two readings.
    """

    def __init__(self, open_meter: Callable[[], Meter | None], every_s: float = _SAMPLE_S) -> None:
        self._open = open_meter
        self._every_s = every_s
        self._found: queue.SimpleQueue[EnergyUsed] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainonce-energy", daemon=True)

    def start(self) -> None:
        """Begin to measure."""
        self._thread.start()

    def take(self) -> list[EnergyUsed]:
        """Return what was measured since the last call."""
        found: list[EnergyUsed] = []
        while not self._found.empty():
            found.append(self._found.get())
        return found

    def finish(self) -> None:
        """Measure once more, and stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_WORD_S)

    def _run(self) -> None:
        meter = self._open()
        if meter is None:
            return
        log = EnergyLog(meter)
        ending = False
        while not ending:
            ending = self._stop.wait(self._every_s)
            used = log.sample()
            if used is not None:
                self._found.put(used)


class Costs:
    """Follows the use of one job; the figures are those of `trainonce report`.

    Args:
        job: The job.
        ending: Ends the job where its budget is used up, if that is wanted.
        economics: Prices and budgets.
        project: Its tag.
        energy: Measures.
        crossed: Thresholds that an earlier part of this job has crossed.
    """

    def __init__(
        self,
        job: Job,
        ending: Ending,
        *,
        economics: EconomicsSettings,
        project: str,
        energy: EnergyThread,
        crossed: Iterable[BudgetCrossed] = (),
    ) -> None:
        self._job = job
        self._ending = ending
        self._prices = economics.prices_of(project)
        self._project = project
        self._energy = energy
        self._watch = BudgetWatch(economics.budgets, [(job.id, event) for event in crossed])
        self._stops = {budget.name for budget in economics.budgets if budget.stop}
        self._joules: float | None = None
        self._begun_s = job.clock.mono_s()
        self._looked_s = float("-inf")
        self._posts: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to measure."""
        self._begun_s = self._job.clock.mono_s()
        self._energy.start()

    def look(self) -> None:
        """Take in what was measured, and alert where a threshold was crossed."""
        now_s = self._job.clock.mono_s()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        self._take()
        self._judge()

    def finish(self) -> None:
        """Record the last reading; called before the job's end is recorded."""
        self._energy.finish()
        self._take()
        self._judge()

    def close(self) -> None:
        """Give webhooks a moment."""
        for thread in self._posts:
            thread.join(_LAST_WORD_S)

    def used(self) -> dict[str, float | None]:
        """Return what the job has used so far, by the metrics that budgets know."""
        job, prices = self._job, self._prices
        elapsed_h = (job.clock.mono_s() - self._begun_s) / 3600
        gpu_hours = (job.options.nproc + job.options.spares) * elapsed_h
        kwh = None if self._joules is None else self._joules / _J_PER_KWH
        if kwh is None and prices.gpu_tdp_w is not None:
            kwh = gpu_hours * prices.gpu_tdp_w / 1000
        price = prices.usd_per_gpu_hour
        return {
            "hours": elapsed_h,
            "gpu_hours": gpu_hours,
            "cost_usd": None if price is None else gpu_hours * price,
            "energy_kwh": None if kwh is None else kwh * prices.pue,
        }

    def _take(self) -> None:
        for event in self._energy.take():
            self._joules = (self._joules or 0.0) + event.energy_j
            self._job.record(event)

    def _judge(self) -> None:
        job = self._job
        for alert in self._watch.observe(job.id, self._project, self.used()):
            event = alert.event
            job.record(event)
            job.say(
                f"budget {event.budget}: {event.used:.4g} of {event.limit:g} {event.metric} used,"
                f" over {event.threshold:.0%}"
            )
            thread = post(alert, job.say, after=self._posts[-1] if self._posts else None)
            if thread is not None:
                self._posts.append(thread)
            stops = event.budget in self._stops and event.threshold >= 1
            if stops and not (job.stopping or job.is_ending):
                job.say(
                    f"the budget is spent ({event.budget}): ending at the next commit; --resume"
                    " goes on from there"
                )
                self._ending.stop(signal.SIGTERM)
