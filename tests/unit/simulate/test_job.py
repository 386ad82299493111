"""Rules of the simulated job."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainonce.simulate.failures import CAUSES, Cause
from trainonce.simulate.job import simulate
from trainonce.simulate.outcome import TIME_PARTS, cost_of
from trainonce.simulate.policies import POLICIES, Policy
from trainonce.simulate.scenario import Scenario
from trainonce.simulate.spares import SparePool
from trainonce.simulate.study import run_policy

TRAINONCE = POLICIES["trainonce"]


@given(
    nodes=st.integers(2, 600),
    spares=st.integers(0, 12),
    name=st.sampled_from(sorted(POLICIES)),
    rate_scale=st.sampled_from([1, 10, 100]),
    seed=st.integers(0, 2**31),
)
def test_every_second_is_booked_once_and_every_failure_has_an_end(
    nodes: int, spares: int, name: str, rate_scale: int, seed: int
) -> None:
    scenario = Scenario(num_gpus=8 * nodes, days=20, spares=spares, repair_h=24 * rate_scale)
    outcome = simulate(scenario, POLICIES[name], seed)
    assert outcome.duration_s == pytest.approx(scenario.duration_s, rel=1e-9)
    assert all(getattr(outcome, part) >= -1e-6 for part in TIME_PARTS)
    assert outcome.served_live + outcome.migrated + outcome.rollbacks == outcome.failures
    assert sum(outcome.failures_by_cause.values()) == outcome.failures


def test_equal_seeds_give_equal_outcomes_and_equal_failures_to_all_policies() -> None:
    scenario = Scenario(num_gpus=2048, days=90)
    assert simulate(scenario, TRAINONCE, 3) == simulate(scenario, TRAINONCE, 3)
    seen = {
        tuple(simulate(scenario, policy, 3).failures_by_cause.items())
        for policy in POLICIES.values()
    }
    assert len(seen) == 1
    assert simulate(scenario, TRAINONCE, 4) != simulate(scenario, TRAINONCE, 3)


def test_live_recovery_loses_no_work_and_rollback_does() -> None:
    scenario = Scenario(num_gpus=4096, days=90)
    always = dataclasses.replace(TRAINONCE, live_share=1.0, checkpoint_interval_s=7200.0)
    outcome = simulate(scenario, always, 0)
    assert outcome.failures > 100
    assert outcome.lost_s == 0.0
    assert outcome.rollbacks == 0
    assert simulate(scenario, POLICIES["restart-tuned"], 0).lost_s > 0


def test_job_waits_for_a_repair_only_without_spares() -> None:
    scenario = Scenario(num_gpus=2048, days=90)
    none = simulate(dataclasses.replace(scenario, spares=0), TRAINONCE, 0)
    plenty = simulate(dataclasses.replace(scenario, spares=100), TRAINONCE, 0)
    assert none.wait_s > 0
    assert none.waits_for_spare > 0
    assert (plenty.wait_s, plenty.waits_for_spare) == (0.0, 0)
    assert none.migrated == none.false_alarms == 0, "a move must never cost a wait"


def test_borrowed_spares_cost_their_hours_and_no_holding() -> None:
    scenario = Scenario(num_gpus=2048)
    policy = POLICIES["trainonce-low-priority"]
    outcome = simulate(scenario, policy, 0)
    assert scenario.spares_for(policy) == 0
    cost = cost_of(outcome, scenario, 0)
    assert cost.spares_usd == pytest.approx(outcome.borrowed_node_s / 3600 * 8 * 3)
    assert outcome.borrowed_node_s > 0


def test_false_alarms_cost_those_who_heed_them() -> None:
    quiet = Scenario(num_gpus=2048, spares=6, false_alarms_per_node_day=0.0)
    noisy = dataclasses.replace(quiet, false_alarms_per_node_day=0.1)
    heeds, ignores = TRAINONCE, dataclasses.replace(TRAINONCE, predicts=False)
    assert simulate(noisy, heeds, 0).ettr < simulate(quiet, heeds, 0).ettr
    assert simulate(noisy, ignores, 0) == simulate(quiet, ignores, 0)
    assert simulate(noisy, heeds, 0).false_alarms > 1000


def test_warning_turns_a_pause_into_a_short_one() -> None:
    warned = (Cause(name="warned", count=1, predictable=1.0, permanent=0.0),)
    scenario = Scenario(num_gpus=2048, causes=warned, spares=50, false_alarms_per_node_day=0.0)
    outcome = simulate(scenario, TRAINONCE, 0)
    assert outcome.migrated > 0.99 * outcome.failures
    assert outcome.recover_s == pytest.approx(
        outcome.migrated * TRAINONCE.migrate_pause_s, rel=0.05
    )


def test_dropped_replica_groups_cost_their_share_while_they_heal() -> None:
    scenario = Scenario(num_gpus=1024, spares=50)
    policy = Policy(
        name="drop",
        checkpoint_interval_s=1e9,
        checkpoint_write_s=0.0,
        detect_exit_s=0.0,
        detect_hang_s=0.0,
        live_share=1.0,
        replica_groups=16,
        heal_s=600.0,
    )
    outcome = simulate(scenario, policy, 0)
    # One group of sixteen for ten minutes a failure, less where a group is hit twice in a row.
    assert outcome.degraded_s == pytest.approx(outcome.failures * 600 / 16, rel=0.02)
    assert outcome.wait_s == 0.0


def test_spares_that_fail_while_idle_are_missing_for_a_while() -> None:
    scenario = Scenario(num_gpus=64, spares=80, days=3650)
    outcome = simulate(scenario, POLICIES["restart-tuned"], 0)
    assert outcome.wait_s == 0.0
    # Ten times as many spares as nodes fail ten times as often, and come back in time.
    few = simulate(dataclasses.replace(scenario, spares=1, repair_h=24 * 30), TRAINONCE, 0)
    assert few.wait_s > 0


def test_pool_hands_returning_nodes_to_the_job_first() -> None:
    pool = SparePool(1)
    assert pool.try_take()
    assert not pool.try_take()
    for back_s in (30.0, 10.0, 20.0):
        pool.send_to_repair(back_s)
    assert pool.release(5.0) == []
    assert pool.release(25.0) == [10.0]
    assert (pool.idle, pool.missing) == (1, 0)
    assert pool.release(99.0) == []
    assert pool.idle == 2


def test_costs_grow_with_size_and_our_policy_wastes_least_of_those_with_idle_spares() -> None:
    names = ("restart-naive", "restart-tuned", "live-migration", "trainonce")
    for num_gpus in (2048, 16_384):
        scenario = Scenario(num_gpus=num_gpus)
        wasted = [run_policy(scenario, POLICIES[n], range(4)).wasted_usd.mean for n in names]
        assert wasted == sorted(wasted, reverse=True)


def test_published_causes_add_up_to_the_published_number_of_interruptions() -> None:
    assert sum(cause.count for cause in CAUSES) == 419
