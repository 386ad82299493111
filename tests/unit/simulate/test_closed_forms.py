"""The simulator against formulae, where they hold."""

import dataclasses
import math

import numpy as np
import pytest

from trainonce.simulate.failures import CAUSES, DAY_S, HOUR_S, RATES, draw_trace
from trainonce.simulate.job import simulate
from trainonce.simulate.policies import POLICIES, Policy
from trainonce.simulate.scenario import Scenario
from trainonce.simulate.study import Estimate, find_spares, run_policy
from trainonce.simulate.theory import (
    ettr_exact,
    ettr_first_order,
    spares_that_pay,
    young_interval_s,
)

SEEDS = range(16)

# Failures that lose no node: then nothing but the policy's own times is at work.
RESTARTS_ONLY = (dataclasses.replace(CAUSES[0], loses_node=False, permanent=0.0, silent=0.0),)


def holds(estimate: Estimate, value: float, widths: float = 3.0) -> bool:
    """Whether `value` lies within a few interval half-widths, so that luck never fails a test."""
    return abs(estimate.mean - value) <= widths * estimate.half


def test_published_rates_give_the_published_mean_times_to_failure() -> None:
    assert RATES["rsc-1"].mttf_s(16_384, 8) / HOUR_S == pytest.approx(1.8, abs=0.01)
    assert RATES["rsc-1"].mttf_s(1024, 8) / HOUR_S == pytest.approx(28.8, abs=0.1)
    assert RATES["rsc-2"].mttf_s(1024, 8) / RATES["rsc-1"].mttf_s(1024, 8) == pytest.approx(
        6.5 / 2.34
    )
    assert RATES["llama3"].mttf_s(16_384, 8) / HOUR_S == pytest.approx(54 * 24 / 419)
    assert RATES["by-scale"].mttf_s(1024, 8) / HOUR_S == pytest.approx(7.9)
    assert RATES["by-scale"].mttf_s(8, 8) / DAY_S == pytest.approx(47.7)


def test_failures_arrive_at_their_rate_and_by_their_causes() -> None:
    mttf_s = Scenario(num_gpus=2048).mttf_s
    trace = draw_trace(np.random.default_rng(5), rate_per_s=1 / mttf_s, duration_s=20_000 * mttf_s)
    gaps_s = np.diff(trace.time_s)
    assert gaps_s.mean() == pytest.approx(mttf_s, rel=0.03)
    assert gaps_s.std() == pytest.approx(mttf_s, rel=0.05)  # exponential: both are equal
    gpu = CAUSES[0].count / sum(cause.count for cause in CAUSES)
    assert (trace.cause == 0).mean() == pytest.approx(gpu, abs=0.015)
    # Overall shares that the table by cause is meant to give.
    assert 0.25 < trace.permanent.mean() < 0.35
    assert 0.2 < trace.predictable.mean() < 0.3


@pytest.mark.parametrize("num_gpus", [1024, 4096, 16_384])
@pytest.mark.parametrize("name", ["restart-naive", "restart-tuned"])
def test_restarts_agree_with_dalys_formula_at_every_failure_rate(name: str, num_gpus: int) -> None:
    scenario = Scenario(num_gpus=num_gpus, causes=RESTARTS_ONLY, days=730)
    policy = POLICIES[name]
    expected = ettr_exact(
        interval_s=scenario.interval_s(policy),
        write_s=policy.checkpoint_write_s,
        recover_s=policy.detect_exit_s + policy.restart_s,
        mttf_s=scenario.mttf_s,
    )
    assert holds(run_policy(scenario, policy, SEEDS).ettr, expected)


def test_first_order_formula_holds_where_failures_are_rare_and_not_where_they_are_not() -> None:
    policy = POLICIES["restart-naive"]
    recover_s = policy.detect_exit_s + policy.restart_s
    for num_gpus, agrees in ((512, True), (16_384, False)):
        scenario = Scenario(num_gpus=num_gpus, causes=RESTARTS_ONLY)
        expected = ettr_first_order(
            interval_s=scenario.interval_s(policy),
            write_s=policy.checkpoint_write_s,
            recover_s=recover_s,
            mttf_s=scenario.mttf_s,
        )
        mean = run_policy(scenario, policy, SEEDS).ettr.mean
        assert (abs(mean - expected) < 0.004) is agrees


def test_youngs_interval_wastes_less_than_others() -> None:
    scenario = Scenario(num_gpus=2048, causes=RESTARTS_ONLY)
    tuned = POLICIES["restart-tuned"]
    young_s = young_interval_s(tuned.checkpoint_write_s, scenario.mttf_s)
    assert scenario.interval_s(tuned) == young_s
    assert young_s == pytest.approx(24 * 60, rel=0.01)  # the published tuning for this cluster
    best = run_policy(scenario, tuned, SEEDS).wasted_usd.mean
    for factor in (0.25, 0.5, 2, 4):
        other = dataclasses.replace(tuned, checkpoint_interval_s=factor * young_s)
        assert run_policy(scenario, other, SEEDS).wasted_usd.mean > best


def test_policy_that_seldom_rolls_back_checkpoints_less_often() -> None:
    scenario = Scenario(num_gpus=2048)
    often = scenario.interval_s(POLICIES["restart-tuned"])
    seldom = scenario.interval_s(POLICIES["trainonce"])
    assert seldom == pytest.approx(often * math.sqrt(10))


def test_two_thousand_gpus_waste_six_million_untuned_and_two_tuned() -> None:
    scenario = Scenario(num_gpus=2048)
    naive, tuned = POLICIES["restart-naive"], POLICIES["restart-tuned"]
    # The arithmetic it is published with.
    year_usd = 2048 * 8760 * 3
    loss = 1 - ettr_first_order(interval_s=7200, write_s=60, recover_s=1800, mttf_s=scenario.mttf_s)
    assert loss == pytest.approx(0.112, abs=0.003)
    assert year_usd * loss == pytest.approx(6.0e6, rel=0.03)
    # The simulation, which counts waiting for spares and failures in mid-recovery too.
    assert run_policy(scenario, naive, SEEDS).wasted_usd.mean == pytest.approx(6.0e6, rel=0.08)
    assert run_policy(scenario, tuned, SEEDS).wasted_usd.mean == pytest.approx(2.0e6, rel=0.12)


def test_live_recovery_agrees_with_its_sum_of_pauses() -> None:
    scenario = Scenario(num_gpus=1024, causes=RESTARTS_ONLY, false_alarms_per_node_day=0.0)
    policy = Policy(
        name="all live",
        checkpoint_interval_s=1e9,
        live_share=1.0,
        detect_exit_s=10.0,
        live_pause_s=30.0,
        live_lost_s=15.0,
    )
    outcome = simulate(scenario, policy, 0)
    assert outcome.failures > 200
    # A failure in mid-recovery shares its pause with the one before; they are rare here.
    assert scenario.duration_s - outcome.productive_s == pytest.approx(
        outcome.failures * (10 + 30 + 15), rel=0.01
    )


def test_nodes_out_follow_littles_law() -> None:
    scenario = Scenario(num_gpus=8192, spares=200)
    policy = dataclasses.replace(POLICIES["trainonce-low-priority"], predicts=False, live_share=1.0,
                                 checkpoint_interval_s=7200.0)  # fmt: skip
    borrowed = Estimate.of(
        [simulate(scenario, policy, seed).borrowed_node_s / scenario.duration_s for seed in SEEDS]
    )
    assert holds(borrowed, scenario.rate_per_s * scenario.mean_out_s(policy))


def test_simulated_number_of_spares_that_pays_is_the_newsvendors() -> None:
    for num_gpus in (1024, 4096):
        study = find_spares(Scenario(num_gpus=num_gpus), POLICIES["restart-tuned"], SEEDS)
        assert abs(study.best.spares - study.closed_form) <= 1
        costs = [result.total_usd.mean for result in study.results]
        assert min(costs) == study.best.total_usd.mean
        assert costs[-1] > min(costs)


def test_no_spare_pays_where_nothing_would_stand_still() -> None:
    assert spares_that_pay(nodes_out=3.0, stall_nodes=1) == 0
    assert spares_that_pay(nodes_out=0.0, stall_nodes=1000) == 0
