"""The pure decisions of the launcher: hangs, deaths, spares, membership."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainonce.controller.membership import Membership
from trainonce.controller.policy import (
    Action,
    Death,
    HangLimits,
    RankStatus,
    Room,
    SlotStatus,
    SpareStatus,
    WhenNoSpare,
    find_room,
    is_out_of_memory,
    judge_death,
    judge_progress,
    place_for_move,
    place_ranks,
    rank_spares,
)
from trainonce.errors import ConfigError
from trainonce.wire.progress import Phase

LIMITS = HangLimits(floor_s=10, outside_floor_s=100, multiple=10, forming_s=50, stopped_s=1)


def ranks(*phases, silent_s=20.0, issued=()):
    issued = issued or [0] * len(phases)
    return [
        RankStatus(rank=rank, phase=phase, silent_s=silent_s, issued=count)
        for rank, (phase, count) in enumerate(zip(phases, issued, strict=True))
    ]


def test_the_rank_that_has_not_entered_the_collective_is_the_culprit():
    decision = judge_progress(ranks(Phase.WAITING, Phase.COMPUTING, Phase.WAITING), LIMITS)
    assert (decision.action, decision.ranks) == (Action.REPLACE, (1,))
    assert decision.reason == "no progress for 20.0 s, limit 10.0 s"


def test_of_several_that_are_late_the_one_with_the_fewest_collectives_is_the_culprit():
    status = ranks(Phase.WAITING, Phase.COMPUTING, Phase.COMPUTING, issued=(7, 6, 5))
    assert judge_progress(status, LIMITS).ranks == (2,)


def test_a_hang_limit_follows_the_median_step_time():
    status = ranks(Phase.WAITING, Phase.COMPUTING)
    assert judge_progress(status, LIMITS, step_times_s=[3, 3, 3]).action is Action.WAIT
    assert judge_progress(status, LIMITS, step_times_s=[1, 1, 1]).action is Action.REPLACE


def test_between_sections_the_limit_is_the_outside_floor():
    status = ranks(Phase.WAITING, Phase.BETWEEN)
    assert judge_progress(status, LIMITS).action is Action.WAIT
    status = ranks(Phase.WAITING, Phase.BETWEEN, silent_s=101)
    assert judge_progress(status, LIMITS).ranks == (1,)


def test_one_rank_that_moves_shows_that_nobody_hangs():
    slow = RankStatus(rank=1, phase=Phase.COMPUTING, silent_s=1)
    assert judge_progress([*ranks(Phase.WAITING), slow], LIMITS).action is Action.WAIT


def test_a_rank_that_is_saving_or_compiling_is_waited_for():
    busy = RankStatus(rank=1, phase=Phase.COMPUTING, silent_s=20, busy_s=5)
    assert judge_progress([*ranks(Phase.WAITING), busy], LIMITS).action is Action.WAIT


def test_rank_that_waits_inside_its_backward_pass_is_known_by_its_open_collective():
    reduces = RankStatus(rank=0, phase=Phase.COMPUTING, silent_s=20, issued=14, pending=1)
    hangs = RankStatus(rank=1, phase=Phase.COMPUTING, silent_s=20, issued=13)
    decision = judge_progress([reduces, hangs], LIMITS)
    assert (decision.action, decision.ranks) == (Action.REPLACE, (1,))


def test_ranks_that_all_wait_are_connected_again_and_none_is_killed():
    assert judge_progress(ranks(Phase.WAITING, Phase.WAITING), LIMITS).action is Action.REFORM


def test_where_nobody_waits_nobody_is_proven_guilty():
    decision = judge_progress(ranks(Phase.COMPUTING, Phase.COMPUTING, silent_s=1e6), LIMITS)
    assert decision.action is Action.WAIT
    assert "no rank waits" in decision.reason


def test_a_stopped_process_is_a_hang_whatever_the_others_do():
    stopped = RankStatus(rank=0, phase=Phase.COMPUTING, stopped_s=1.5)
    decision = judge_progress([stopped], LIMITS, forming_s=0.0)
    assert (decision.action, decision.ranks) == (Action.REPLACE, (0,))


def test_newcomers_that_never_become_consistent_are_replaced():
    status = [
        RankStatus(rank=0, phase=Phase.WAITING),
        RankStatus(rank=1, phase=Phase.SETUP, newcomer=True),
    ]
    assert judge_progress(status, LIMITS, forming_s=49).action is Action.WAIT
    assert judge_progress(status, LIMITS, forming_s=51).ranks == (1,)


def test_hang_limits_must_be_positive():
    with pytest.raises(ConfigError):
        HangLimits(floor_s=0)


def death(rank=0, step=5, cause="exception", detail="ValueError: x", **fields):
    return Death(rank=rank, step=step, cause=cause, detail=detail, **fields)


def test_the_same_death_in_another_section_is_another_failure():
    assert judge_death([death(step=5), death(step=6)], 2).action is Action.REPLACE


def test_the_same_death_in_the_same_section_is_a_bug():
    assert judge_death([death(), death()], 2).action is Action.END


@pytest.mark.parametrize("step", [-1, 5])
def test_what_we_refuse_ends_the_job_at_once(step):
    assert judge_death([death(step=step, cause="misuse")], 2).action is Action.END
    assert judge_death([death(step=step)], 2).action is Action.REPLACE


def test_a_rebuild_that_fails_is_tried_once_more():
    failed = death(cause="recovery", detail="RecoveryError: x")
    assert judge_death([failed], 2).action is Action.REPLACE
    assert judge_death([failed] * 2, 2).action is Action.END


def test_another_exception_in_the_same_section_is_another_failure():
    assert judge_death([death(), death(detail="ValueError: y")], 3).action is Action.REPLACE


@pytest.mark.parametrize(("signum", "limit"), [(11, 2), (9, 5)])
def test_a_crash_is_met_twice_and_a_kill_from_outside_five_times(signum, limit):
    one = death(cause="signal", detail="S", signum=signum)
    assert judge_death([one] * (limit - 1), 2).action is Action.REPLACE
    assert judge_death([one] * limit, 2).action is Action.END


def test_hangs_in_one_section_are_the_same_however_long_they_were_watched():
    history = [death(cause="hang", detail=f"no progress for 30.{n} s") for n in range(5)]
    assert judge_death(history[:4], 2).action is Action.REPLACE
    assert judge_death(history, 2).action is Action.END


def test_deaths_by_the_fault_plan_prove_nothing():
    assert judge_death([death(chaos=True)] * 9, 2).action is Action.REPLACE
    assert judge_death([death(chaos=True), death()], 2).action is Action.REPLACE


def test_one_exception_of_a_single_rank_is_not_the_same_from_all():
    assert judge_death([death()], 1).action is Action.REPLACE


def test_spares_before_the_first_batch_are_taken_first_and_stopped_ones_never():
    spares = [
        SpareStatus(worker=2, connected=True),
        SpareStatus(worker=3, where="rank", connected=True),
        SpareStatus(worker=4, where="loop", connected=True, stopped=True),
        SpareStatus(worker=5, where="loop", connected=True),
        SpareStatus(worker=6),
    ]
    assert rank_spares(spares) == [5, 3, 2]


@given(st.data())
def test_no_order_of_deaths_and_reports_lets_an_inconsistent_rank_survive(data):
    world = data.draw(st.integers(1, 5))
    membership = Membership(workers=tuple(range(world)), joined=frozenset(range(world)))
    consistent, next_worker = set(range(world)), world
    for _ in range(data.draw(st.integers(0, 20))):
        event = data.draw(st.sampled_from(["lose", "announce", "join", "late"]))
        rank = data.draw(st.integers(0, world - 1))
        if event == "lose":
            membership = membership.lose([rank])
            consistent.discard(rank)
        elif event == "announce":
            fresh = {r: next_worker + i for i, r in enumerate(sorted(membership.lost))}
            next_worker += len(fresh)
            before = membership.generation
            membership = membership.succeed(fresh)
            assert membership.generation == before + 1
            assert not membership.is_formed
        elif event == "join":
            if rank not in membership.lost:
                consistent.add(rank)
            membership = membership.join(rank, membership.generation)
        else:
            assert membership.join(rank, membership.generation - 1) == membership
        assert membership.survivors == consistent
        assert len(set(membership.workers)) == world
        if membership.is_formed:
            assert membership.survivors == membership.ranks


def test_replacements_must_be_for_exactly_the_lost_ranks():
    with pytest.raises(ValueError, match="lost"):
        Membership(workers=(0, 1)).lose([1]).succeed({0: 2})


def slots(*workers, lost=()):
    return [
        SlotStatus(slot=n, workers=count, usable=n not in lost) for n, count in enumerate(workers)
    ]


@pytest.mark.parametrize("policy", WhenNoSpare)
def test_a_free_slot_is_used_whatever_is_to_happen_without_one(policy):
    room = find_room(1, slots(1, 0, 1), policy)
    assert (room.slots, room.short, room.shared, room.leave) == ((1,), 0, 0, False)


def test_without_a_free_slot_it_is_waited_spread_or_left_as_asked_for():
    lost = slots(1, 0, 1, lost=[1])
    assert find_room(1, lost, WhenNoSpare.WAIT) == Room(short=1)
    assert find_room(1, lost, WhenNoSpare.SPREAD) == Room(slots=(0,), shared=1)
    assert find_room(1, lost, WhenNoSpare.CHECKPOINT) == Room(slots=(0,), shared=1, leave=True)


def test_several_guests_go_to_different_slots_and_after_those_with_guests():
    crowded = slots(1, 0, 2, 1, 0, lost=[1, 4])
    assert find_room(2, crowded, WhenNoSpare.SPREAD).slots == (0, 3)
    assert find_room(4, crowded, WhenNoSpare.SPREAD).slots == (0, 3, 0, 2)


def test_what_is_free_is_used_before_anything_is_shared():
    room = find_room(2, slots(1, 0, 0, lost=[1]), WhenNoSpare.SPREAD)
    assert (room.slots, room.shared) == ((2, 0), 1)


def test_a_slot_that_will_fail_takes_a_guest_only_where_there_is_no_other():
    assert find_room(1, slots(1, 2, 0, lost=[0, 2]), WhenNoSpare.SPREAD).slots == (1,)
    assert find_room(1, slots(1, 0, lost=[0, 1]), WhenNoSpare.SPREAD).slots == (0,)


@pytest.mark.parametrize("policy", WhenNoSpare)
def test_nothing_is_spread_over_a_host_where_nobody_lives(policy):
    assert find_room(2, slots(0, 0, lost=[0, 1]), policy) == Room(short=2)


def test_a_start_of_all_ranks_keeps_each_in_its_slot_and_moves_only_who_must():
    assert place_ranks(3, slots(0, 0, 0, 0), WhenNoSpare.WAIT) == (0, 1, 2)
    assert place_ranks(3, slots(0, 0, 0, 0, lost=[1]), WhenNoSpare.WAIT) == (0, 3, 2)
    assert place_ranks(3, slots(0, 0, 0, lost=[1]), WhenNoSpare.SPREAD) == (0, 0, 2)


@pytest.mark.parametrize("policy", [WhenNoSpare.WAIT, WhenNoSpare.CHECKPOINT])
def test_a_start_of_all_ranks_without_room_for_all_is_none(policy):
    assert place_ranks(3, slots(0, 0, 0, lost=[1]), policy) == ()


def test_a_move_goes_to_a_free_slot_or_stays_where_it_is():
    assert place_for_move(slots(1, 1, 0), 0, WhenNoSpare.WAIT) == 2
    assert place_for_move(slots(1, 1), 1, WhenNoSpare.WAIT) == 1


def test_a_move_away_from_a_bad_device_makes_a_guest_only_where_that_is_wanted():
    bad = slots(1, 1, 2, lost=[0])
    assert place_for_move(bad, 0, WhenNoSpare.SPREAD) == 1
    assert place_for_move(bad, 0, WhenNoSpare.WAIT) is None


def test_want_of_memory_on_a_shared_device_is_no_bug_of_the_script():
    detail = "OutOfMemoryError: CUDA out of memory"
    alone = [Death(rank=1, step=4, cause="exception", detail=detail)] * 2
    assert judge_death(alone, 2).action is Action.END
    crowded = [Death(rank=1, step=4, cause="exception", detail=detail, crowded=True)] * 4
    assert judge_death(crowded, 2).action is Action.REPLACE
    assert is_out_of_memory(detail)
    assert is_out_of_memory("AcceleratorError: CUDA error: out of memory")
    assert is_out_of_memory("RuntimeError: DefaultCPUAllocator: can't allocate memory")
    assert not is_out_of_memory("ValueError: no such key in memory")


def test_ranks_that_took_different_ways_through_the_script_are_told_apart_from_a_hang():
    def status(rank, phase, commits, pending=0, inside=False):
        return RankStatus(
            rank=rank, phase=phase, commits=commits, pending=pending, inside=inside, silent_s=20
        )

    ended = status(0, Phase.ENDING, 24)
    reduces = status(1, Phase.COMPUTING, 24, pending=1, inside=True)
    decision = judge_progress([ended, reduces], LIMITS)
    assert decision.action is Action.END
    assert "step 24 for rank 0, whose script ended after 24 steps" in decision.reason
    # Between steps it may wait for what rank 0 took part in: only a second time proves it.
    between = [ended, status(1, Phase.WAITING, 24)]
    assert judge_progress(between, LIMITS).action is Action.REFORM
    assert judge_progress(between, LIMITS, reformed=True).action is Action.END
    # The last step of the rank that has not ended: its message may be lost.
    behind = judge_progress([ended, status(1, Phase.WAITING, 23)], LIMITS)
    assert behind.action is Action.REFORM
    # A third rank is neither waiting nor at its end: it is the culprit.
    third = [ended, status(1, Phase.WAITING, 24), status(2, Phase.COMPUTING, 24)]
    assert judge_progress(third, LIMITS).ranks == (2,)
