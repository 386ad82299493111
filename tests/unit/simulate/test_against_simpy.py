"""The event loop against a second model of the same rules, written as processes in simpy."""

import dataclasses
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from trainonce.simulate.failures import HOUR_S, Trace, draw_trace
from trainonce.simulate.job import simulate
from trainonce.simulate.policies import POLICIES, Policy
from trainonce.simulate.scenario import Scenario

simpy = pytest.importorskip("simpy")


class ProcessModel:
    """One job as a process that failures interrupt, with a container of repaired nodes."""

    def __init__(self, scenario: Scenario, policy: Policy, trace: Trace) -> None:
        self.scenario, self.policy, self.trace = scenario, policy, trace
        self.env = simpy.Environment()
        self.pool = simpy.Container(self.env, init=0, capacity=10**6)
        self.missing: list[Any] = []
        self.saved_s = self.lost_s = self.uncommitted_s = 0.0
        self.job = self.env.process(self.run())
        self.env.process(self.fail())
        self.env.run(until=scenario.duration_s)

    def fail(self) -> Generator[Any, Any, None]:
        for index, time_s in enumerate(self.trace.time_s.tolist()):
            yield self.env.timeout(time_s - self.env.now)
            self.job.interrupt(index)

    def repair(self, index: int) -> Generator[Any, Any, None]:
        hours = (
            self.trace.repair[index] * self.scenario.repair_h
            if self.trace.permanent[index]
            else self.scenario.reset_h
        )
        yield self.env.timeout(float(hours) * HOUR_S)
        yield self.pool.put(1)

    def note(self, index: int) -> None:
        """Book what a failure costs and needs."""
        policy, trace = self.policy, self.trace
        live = trace.luck[index] < policy.live_share
        loses_node = self.scenario.causes[trace.cause[index]].loses_node
        if not live:
            self.lost_s += self.uncommitted_s
            self.uncommitted_s = self.phase_s = 0.0
        detect_s = policy.detect_hang_s if trace.silent[index] else policy.detect_exit_s
        self.noticed_s = max(self.noticed_s, self.env.now + detect_s)
        self.recover_for_s = max(
            self.recover_for_s, policy.live_pause_s if live else policy.restart_s
        )
        if loses_node and (live or trace.permanent[index]):
            self.env.process(self.repair(index))
            self.missing.append(self.pool.get(1))

    def run(self) -> Generator[Any, Any, None]:
        policy, interval_s = self.policy, self.scenario.interval_s(self.policy)
        self.phase_s = 0.0
        while True:
            self.noticed_s = self.recover_for_s = 0.0
            try:
                while True:  # one checkpoint interval after another
                    begun_s, phase_s = self.env.now, self.phase_s
                    if phase_s < interval_s:
                        yield self.env.timeout(interval_s - phase_s)
                        self.uncommitted_s += interval_s - phase_s
                        self.phase_s = interval_s
                        begun_s, phase_s = self.env.now, interval_s
                    yield self.env.timeout(interval_s + policy.checkpoint_write_s - phase_s)
                    self.saved_s += self.uncommitted_s
                    self.uncommitted_s = self.phase_s = 0.0
            except simpy.Interrupt as interrupt:
                ran_s = self.env.now - begun_s
                if phase_s < interval_s:
                    self.uncommitted_s += ran_s
                self.phase_s = phase_s + ran_s
                self.note(interrupt.cause)
            while True:  # until an outage passes without another failure
                try:
                    if self.noticed_s > self.env.now:
                        yield self.env.timeout(self.noticed_s - self.env.now)
                    yield self.env.all_of(self.missing)
                    self.missing = []
                    yield self.env.timeout(self.recover_for_s)
                    break
                except simpy.Interrupt as interrupt:
                    self.note(interrupt.cause)


@pytest.mark.parametrize("name", ["restart-naive", "restart-tuned", "live-migration", "trainonce"])
@pytest.mark.parametrize(("num_gpus", "repair_h"), [(1024, 24), (16_384, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_event_loop_and_process_model_agree_on_every_run(
    name: str, num_gpus: int, repair_h: float, seed: int
) -> None:
    # Spares, warnings and repeated steps are left out; the two models share the rest.
    policy = dataclasses.replace(POLICIES[name], predicts=False, live_lost_s=0.0)
    scenario = Scenario(
        num_gpus=num_gpus, days=60, repair_h=repair_h, spares=0, false_alarms_per_node_day=0.0
    )
    trace = draw_trace(
        np.random.default_rng(seed).spawn(3)[0],  # the stream `simulate` draws failures from
        rate_per_s=scenario.rate_per_s,
        duration_s=scenario.duration_s,
        causes=scenario.causes,
    )
    model = ProcessModel(scenario, policy, trace)
    outcome = simulate(scenario, policy, seed)
    assert outcome.failures == len(trace) > 0
    assert outcome.lost_s == pytest.approx(model.lost_s, rel=1e-9)
    # The process model books a segment when it ends, so the last one may be missing there.
    done_s = model.saved_s + model.uncommitted_s
    assert done_s - 1e-3 <= outcome.productive_s <= done_s + scenario.interval_s(policy)
