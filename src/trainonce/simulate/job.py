"""One job in simulated time.

Between two arrivals nothing about the job has to be decided, so the loop goes from one to the next
and books the time between them. Checkpoints need no events of their own, and a year of 16,384 GPUs
is a few thousand turns. `tests/unit/simulate/test_against_simpy.py` holds the same rules against a
process model in simpy, which takes several times as long (benchmarks/simulate).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainonce.simulate.failures import DAY_S, HOUR_S, Trace, arrivals, draw_trace
from trainonce.simulate.outcome import Outcome
from trainonce.simulate.spares import SparePool

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainonce.simulate.policies import Policy
    from trainonce.simulate.scenario import Scenario

_FAILURE, _ALARM, _SPARE_FAILURE = range(3)


def simulate(scenario: Scenario, policy: Policy, seed: int) -> Outcome:
    """Simulate one job and return where its time went.

    Equal seeds draw equal failures, whatever the policy and the number of spares, so that
    differences between them are not luck.
    """
    failure_rng, alarm_rng, spare_rng = np.random.default_rng(seed).spawn(3)
    duration_s, rate_per_s = scenario.duration_s, scenario.rate_per_s
    spares = scenario.spares_for(policy)
    failures = draw_trace(
        failure_rng, rate_per_s=rate_per_s, duration_s=duration_s, causes=scenario.causes
    )
    spare_failures = draw_trace(
        spare_rng,
        rate_per_s=rate_per_s * spares / scenario.num_nodes,
        duration_s=duration_s,
        causes=scenario.causes,
    )
    alarms_per_s = scenario.false_alarms_per_node_day * scenario.num_nodes / DAY_S
    alarms = arrivals(alarm_rng, alarms_per_s if policy.predicts else 0.0, duration_s)
    job = _Job(scenario, policy, spares, failures, spare_failures)
    for time_s, kind, index in heapq.merge(
        _events(failures.time_s, _FAILURE),
        _events(alarms, _ALARM),
        _events(spare_failures.time_s, _SPARE_FAILURE),
    ):
        job.advance(time_s)
        if kind == _FAILURE:
            job.fail(index)
        elif kind == _ALARM:
            job.raise_false_alarm()
        else:
            job.fail_spare(index)
    job.advance(duration_s)
    return job.outcome


def _events(times_s: NDArray[np.float64], kind: int) -> list[tuple[float, int, int]]:
    return [(time_s, kind, index) for index, time_s in enumerate(times_s.tolist())]


@dataclass
class _Outage:
    """The job stands still: first unnoticed, then for want of a spare, then recovering."""

    noticed_s: float
    spare_ready_s: float
    recover_s: float

    def also(self, other: _Outage) -> None:
        """A failure in mid-outage starts what it needs anew."""
        self.noticed_s = max(self.noticed_s, other.noticed_s)
        self.spare_ready_s = max(self.spare_ready_s, other.spare_ready_s)
        self.recover_s = max(self.recover_s, other.recover_s)


class _Job:
    """The state of the job, from one arrival to the next."""

    def __init__(
        self, scenario: Scenario, policy: Policy, spares: int, failures: Trace, idle: Trace
    ) -> None:
        self._scenario, self._policy, self._spares = scenario, policy, spares
        self._interval_s = scenario.interval_s(policy)
        # Plain lists: the loop reads single elements, which numpy is slow at.
        self._causes = failures.cause.tolist()
        self._permanent = failures.permanent.tolist()
        self._predictable = failures.predictable.tolist()
        self._silent = failures.silent.tolist()
        self._place = failures.place.tolist()
        self._luck = failures.luck.tolist()
        self._out_s = _out_s(failures, scenario)
        self._spare_place = idle.place.tolist()
        self._spare_out_s = _out_s(idle, scenario)

        self.outcome = Outcome(
            failures=len(failures),
            failures_by_cause={
                cause.name: self._causes.count(i) for i, cause in enumerate(scenario.causes)
            },
        )
        self._now_s = 0.0
        self._phase_s = 0.0  # since the last checkpoint was complete, its own write included
        self._uncommitted_s = 0.0  # work since then
        self._outage: _Outage | None = None
        self._pool = SparePool(spares)
        self._num_groups = min(policy.replica_groups, scenario.num_nodes)
        self._down_until_s: dict[int, float] = {}
        self._groups_waiting: deque[int] = deque()

    def advance(self, until_s: float) -> None:
        """Let time pass, with nothing arriving before `until_s`."""
        handed = self._pool.release(until_s)
        if self._num_groups:
            for back_s in handed:
                self._heal_group(back_s)
        elif handed and not self._pool.missing and self._outage:
            self._outage.spare_ready_s = handed[-1]
        if self._outage:
            self._stand_still(self._outage, until_s)
        if self._now_s < until_s:
            self._compute(until_s)

    def fail(self, index: int) -> None:
        """A node of the job fails now."""
        policy, outcome, now_s = self._policy, self.outcome, self._now_s
        out_s, silent = self._out_s[index], self._silent[index]
        planned = policy.predicts and self._predictable[index] and self._can_migrate()
        live = planned or self._luck[index] < policy.live_share
        if planned:
            outcome.migrated += 1
            detect_s, recover_s = 0.0, policy.migrate_pause_s
        else:
            detect_s = policy.detect_hang_s if silent else policy.detect_exit_s
            recover_s = policy.live_pause_s if live else policy.restart_s
            outcome.served_live += live
            self._lose(policy.live_lost_s if live else math.inf)
        if not live:
            outcome.rollbacks += 1
            self._phase_s = 0.0
        # A restart waits for a reset in place (`restart_s` holds it); one served live does not.
        needs_node = out_s > 0 and (live or self._permanent[index])
        ready_s = self._replace_node(out_s, planned=planned) if needs_node else now_s
        if self._num_groups:
            self._drop_group(index, ready_s, heal_s=policy.heal_s if live else 0.0)
            ready_s = now_s
        self._stop(_Outage(now_s + detect_s, ready_s, recover_s))

    def raise_false_alarm(self) -> None:
        """A healthy node is suspected and moved away from, if that is possible now."""
        if self._can_migrate():
            self.outcome.false_alarms += 1
            ready_s = self._replace_node(self._scenario.inspection_h * HOUR_S, planned=True)
            self._stop(_Outage(self._now_s, ready_s, self._policy.migrate_pause_s))

    def fail_spare(self, index: int) -> None:
        """One of the spare nodes fails, if the one that is hit is idle at the time."""
        if self._spare_place[index] * self._spares < self._pool.idle and self._spare_out_s[index]:
            self._pool.idle -= 1
            self._pool.send_to_repair(self._now_s + self._spare_out_s[index])

    def _can_migrate(self) -> bool:
        """A move needs a running job and a spare that is there now: it must never cost a wait."""
        return self._outage is None and (
            self._policy.spare_source == "low-priority" or self._pool.idle > 0
        )

    def _replace_node(self, out_s: float, *, planned: bool) -> float:
        """Send a node away for `out_s`; return when its replacement is there, inf if unknown.

        A planned move borrows its node while the job still runs.
        """
        if self._policy.spare_source == "low-priority":
            rest_s = self._scenario.duration_s - self._now_s
            self.outcome.borrowed_node_s += min(out_s, rest_s)
            return self._now_s + (0.0 if planned else self._policy.borrow_s)
        self._pool.send_to_repair(self._now_s + out_s)
        if self._pool.try_take():
            return self._now_s
        self.outcome.waits_for_spare += 1
        return math.inf

    def _drop_group(self, index: int, ready_s: float, heal_s: float) -> None:
        group = int(self._place[index] * self._num_groups)
        if ready_s == math.inf:
            self._groups_waiting.append(group)
        down_s = max(self._down_until_s.get(group, 0.0), ready_s + heal_s)
        self._down_until_s[group] = down_s

    def _heal_group(self, back_s: float) -> None:
        group = self._groups_waiting.popleft()
        if group not in self._groups_waiting:
            self._down_until_s[group] = back_s + self._policy.heal_s

    def _stop(self, outage: _Outage) -> None:
        if self._outage:
            self._outage.also(outage)
        else:
            self._outage = outage

    def _lose(self, work_s: float) -> None:
        lost_s = min(work_s, self._uncommitted_s)
        self._uncommitted_s -= lost_s
        self.outcome.productive_s -= lost_s
        self.outcome.lost_s += lost_s

    def _stand_still(self, outage: _Outage, until_s: float) -> None:
        outcome = self.outcome
        outcome.detect_s += self._pass_time(outage.noticed_s, until_s)
        outcome.wait_s += self._pass_time(outage.spare_ready_s, until_s)
        end_s = max(outage.noticed_s, outage.spare_ready_s) + outage.recover_s
        outcome.recover_s += self._pass_time(end_s, until_s)
        if self._now_s >= end_s:
            self._outage = None

    def _pass_time(self, end_s: float, until_s: float) -> float:
        """Go on to `end_s`, at most to `until_s`, and return how long that was."""
        passed_s = max(0.0, min(end_s, until_s) - self._now_s)
        self._now_s += passed_s
        return passed_s

    def _compute(self, until_s: float) -> None:
        """Run, with checkpoints, from now to `until_s`."""
        interval_s = self._interval_s
        passed_s = until_s - self._now_s
        writes, phase_s = divmod(
            self._phase_s + passed_s, interval_s + self._policy.checkpoint_write_s
        )
        since_s = min(phase_s, interval_s)
        work_s = writes * interval_s + since_s - min(self._phase_s, interval_s)
        share = 1.0 - self._down_share(until_s)
        self.outcome.checkpoint_s += passed_s - work_s
        self.outcome.degraded_s += work_s * (1.0 - share)
        self.outcome.productive_s += work_s * share
        self._uncommitted_s = since_s * share if writes else self._uncommitted_s + work_s * share
        self._phase_s, self._now_s = phase_s, until_s

    def _down_share(self, until_s: float) -> float:
        """Share of the job's capacity that was missing from now to `until_s`."""
        if not self._down_until_s:
            return 0.0
        now_s = self._now_s
        down_s = sum(max(0.0, min(end, until_s) - now_s) for end in self._down_until_s.values())
        self._down_until_s = {g: end for g, end in self._down_until_s.items() if end > until_s}
        return down_s / (self._num_groups * (until_s - now_s))


def _out_s(trace: Trace, scenario: Scenario) -> list[float]:
    """Seconds for which each failure takes its node away; 0 where it loses no node."""
    loses_node = np.array([cause.loses_node for cause in scenario.causes])[trace.cause]
    hours = np.where(trace.permanent, trace.repair * scenario.repair_h, scenario.reset_h)
    return (np.where(loses_node, hours, 0.0) * HOUR_S).tolist()
