"""How a generation becomes consistent, from what each rank reports."""

import dataclasses
import json

import pytest

from trainonce.errors import CollectiveError, RecoveryError
from trainonce.worker.operation import SETUP, STAGES, UNSHARED, Known, bucket_order_interval
from trainonce.worker.plan import RankReport, plan_recovery

WORLD = "world"
SUM = "all_reduce(float32[8],SUM)"


def report(
    commits, done=(), pending=(), *, fresh=False, donor=True, original=True, ranks=3, shards=()
):
    ops = {(WORLD, interval, seq): (SUM, True) for interval, seq in done}
    ops |= {(WORLD, interval, seq): (SUM, False) for interval, seq in pending}
    return RankReport(
        fresh=fresh, commits=commits, donor=donor and not fresh, original=original,
        groups={WORLD: list(range(ranks))}, ops=ops, shards=list(shards),
    )  # fmt: skip


def donations(plan):
    return [(each.sources, each.targets) for each in plan.donations]


FRESH = report(0, fresh=True, original=False)


def test_a_newcomer_gets_the_state_and_the_results_of_the_step_in_flight():
    plan = plan_recovery([report(5, [(5, 0)], [(5, 1)]), FRESH, report(5, [(5, 0)], [(5, 1)])])
    assert (plan.commits, donations(plan)) == (5, [((0,), (1,))])
    assert [(t.name[1:], t.source, t.targets) for t in plan.results] == [((5, 0), 0, (1,))]


def test_a_rank_one_step_behind_gets_results_and_no_state():
    ahead, behind = report(6, [(5, 0), (5, 1)]), report(5, [(5, 0)], [(5, 1)])
    plan = plan_recovery([behind, ahead, FRESH])
    assert (plan.commits, donations(plan)) == (6, [((1,), (2,))])
    assert [(t.name[1:], t.targets) for t in plan.results] == [((5, 1), (0,))]


def test_results_that_were_dropped_leave_a_newcomer_nothing_to_go_on_from():
    full = dataclasses.replace(report(5), dropped=True)
    with pytest.raises(RecoveryError, match="too many for their results to be kept"):
        plan_recovery([full, FRESH, report(5)])
    assert plan_recovery([full, report(5), report(5)]).commits == 5  # nobody asks for them


def test_results_complete_out_of_order_and_come_from_whoever_holds_them():
    plan = plan_recovery(
        [report(5, [(5, 2)], [(5, 0), (5, 1)]), report(5, [(5, 0)], [(5, 1), (5, 2)]), FRESH]
    )
    assert [(t.name[2], t.source, t.targets) for t in plan.results] == [
        (0, 1, (0, 2)),
        (2, 0, (1, 2)),
    ]


def test_a_donor_that_has_begun_its_update_without_a_copy_is_passed_over():
    plan = plan_recovery([report(5, donor=False), report(5), FRESH])
    assert donations(plan) == [((1,), (2,))]


def test_without_any_donor_there_is_no_plan():
    with pytest.raises(RecoveryError, match="no rank holds the state"):
        plan_recovery([report(5, donor=False), FRESH, report(5, donor=False)])


def test_without_survivors_there_is_no_plan():
    with pytest.raises(RecoveryError, match="no rank survived"):
        plan_recovery([FRESH, FRESH])


def test_ranks_that_drifted_apart_are_refused():
    with pytest.raises(RecoveryError, match="more than one step behind"):
        plan_recovery([report(7), report(5), report(7)])


def test_ranks_that_disagree_about_an_operation_are_told_which():
    other = RankReport(
        fresh=False, commits=5, donor=True, groups={WORLD: [0, 1]},
        ops={(WORLD, 5, 0): ("broadcast(float32[8],0)", False)},
    )  # fmt: skip
    with pytest.raises(CollectiveError, match=r"rank 0 issued all_reduce.*rank 1 issued broadcast"):
        plan_recovery([report(5, [(5, 0)]), other])


def test_results_of_set_up_and_of_bucket_orders_go_to_newcomers_at_any_step():
    order = bucket_order_interval(0)
    survivor = report(9, [(SETUP, 0), (order, 0), (UNSHARED, 0), (8, 0)], ranks=2)
    plan = plan_recovery([survivor, report(0, fresh=True, original=False, ranks=2)])
    assert {t.name[1] for t in plan.results} == {SETUP, order}


def test_the_bucket_order_is_given_by_a_rank_that_was_there_from_the_beginning():
    replaced = report(1, original=False)
    assert plan_recovery([FRESH, replaced, report(1)]).order_ranks[0] == 2


def test_a_re_formed_group_moves_nothing():
    plan = plan_recovery([report(5, [(5, 0)]), report(5, [(5, 0)]), report(5, [(5, 0)])])
    assert (plan.donations, plan.results) == ((), ())


def test_a_newcomer_gets_its_shard_from_all_ranks_that_hold_the_same():
    table = ["a", "b", "a", "b", "a", "b"]
    alive, dead = report(5, ranks=6, shards=table), report(0, fresh=True, ranks=6)
    plan = plan_recovery([alive, dead, dead, alive, alive, alive])
    assert donations(plan) == [((3, 5), (1,)), ((0, 4), (2,))]
    assert plan.shards == tuple(table)


def test_a_shard_that_nobody_holds_any_more_is_named():
    alive, dead = (
        report(5, ranks=4, shards=["a", "b", "a", "b"]), report(0, fresh=True, ranks=4),
    )  # fmt: skip
    with pytest.raises(RecoveryError, match=r"part of the state that ranks \[1, 3\] held"):
        plan_recovery([alive, dead, alive, dead])


def test_a_rank_that_alone_holds_a_shard_commits_first_where_it_lags_behind():
    table = ["a", "b", "a", "b"]
    ahead = report(6, [(5, 0), (5, 1)], ranks=4, shards=table)
    behind = report(5, [(5, 0)], [(5, 1)], ranks=4, shards=table)
    plan = plan_recovery([ahead, report(0, fresh=True, ranks=4), ahead, behind])
    assert (plan.catch_up, plan.donations) == ((3,), ())
    assert [(t.name[1:], t.targets) for t in plan.results] == [((5, 1), (3,))]
    plan = plan_recovery([ahead, report(0, fresh=True, ranks=4), ahead, ahead])
    assert (plan.catch_up, donations(plan)) == ((), [((3,), (1,))])


def gathers(commits, known, **more):
    ops = {("pair", 5, seq): ("all_gather(float32[8])", what) for seq, what in known.items()}
    return RankReport(
        fresh=False, commits=commits, donor=True, groups={"pair": [0, 1, 2]}, ops=ops, **more
    )


def test_what_is_kept_as_inputs_only_is_issued_again_by_all_where_one_lacks_the_result():
    kept = gathers(5, {0: Known.INPUT, 1: Known.INPUT, 2: Known.NOTHING})
    slower = gathers(5, {0: Known.INPUT, 1: Known.NOTHING})
    assert plan_recovery([kept, kept, slower]).again == (("pair", 5, 1),)
    plan = plan_recovery([kept, FRESH, slower])
    assert plan.again == (("pair", 5, 0), ("pair", 5, 1))
    assert plan.results == ()


def test_a_result_that_somebody_has_is_handed_over_and_not_reduced_again():
    plan = plan_recovery([gathers(5, {0: Known.INPUT}), gathers(5, {0: Known.RESULT}), FRESH])
    assert [(t.source, t.targets) for t in plan.results] == [(1, (2,))]
    assert plan.again == ()


def shadowed(*commits):
    return RankReport(fresh=True, commits=0, donor=False, shadows=list(commits))


def test_newcomers_without_a_donor_go_on_from_the_newest_shadow_that_all_have():
    alone = report(6, [(5, 0), (6, 0)], ranks=3, shards=["a", "b", "c"])
    plan = plan_recovery([alone, shadowed(6, 5), shadowed(6, 5)])
    assert (plan.restores, plan.num_recomputed(1)) == ({1: 6, 2: 6}, 1)
    plan = plan_recovery([alone, shadowed(6, 5), shadowed(5, 4)])
    assert (plan.restores, plan.num_recomputed(1)) == ({1: 5, 2: 5}, 2)
    assert {t.name[1] for t in plan.results} == {5, 6}
    with pytest.raises(RecoveryError, match="no living rank holds the part"):
        plan_recovery([alone, shadowed(4, 3), shadowed(6, 5)])


def test_reports_survive_the_wire():
    sent = report(5, [(5, 0)], [(5, 1)], shards=["a", "b", "a"])
    assert RankReport.from_record(json.loads(json.dumps(sent.to_record()))) == sent


def talking(commits, sent=(), received=(), awaited=(), *, fresh=False, rank=0):
    """Two ranks with a channel each way; what this one sent, received, and waits for."""
    there, back = f"world:{rank}>{1 - rank}#0", f"world:{1 - rank}>{rank}#0"
    ops = {(there, commits, seq): ("message(8 bytes)", Known.RESULT) for seq in sent}
    ops |= {(back, commits, seq): ("message(8 bytes)", Known.TAKEN) for seq in received}
    ops |= {(back, commits, seq): ("message(8 bytes)", Known.NOTHING) for seq in awaited}
    return RankReport(
        fresh=fresh, commits=0 if fresh else commits, donor=not fresh,
        groups={WORLD: [0, 1]}, ops=ops,
        channels={} if fresh else {there: [rank, 1 - rank], back: [1 - rank, rank]},
    )  # fmt: skip


def messages(plan):
    return [(t.name[0][6:9], t.name[2], t.source, t.targets) for t in plan.results]


def test_a_new_receiver_gets_the_senders_copies_and_a_new_sender_is_told_what_has_arrived():
    plan = plan_recovery(
        [talking(5, sent=(0, 1), received=(0, 2), awaited=(1,)), talking(5, fresh=True, rank=1)]
    )
    assert messages(plan) == [("0>1", 0, 0, (1,)), ("0>1", 1, 0, (1,))]
    assert plan.taken == (("world:1>0#0", 5, 0), ("world:1>0#0", 5, 2))
    assert plan.again == ()


def test_a_survivor_that_waits_gets_what_was_sent_and_nothing_that_it_has():
    plan = plan_recovery(
        [talking(5, sent=(0, 1, 2)), talking(5, received=(0,), awaited=(1,), rank=1)]
    )
    assert messages(plan) == [("0>1", 1, 0, (1,)), ("0>1", 2, 0, (1,))]
    assert plan.taken == ()


def test_messages_of_a_committed_step_are_not_sent_to_who_is_past_it():
    ahead = talking(6, rank=1)
    ahead.ops.clear()
    plan = plan_recovery([talking(5, sent=(0, 1)), ahead])
    assert messages(plan) == []


def test_what_the_stages_of_a_pipeline_told_each_other_is_served_whatever_the_step():
    told = talking(7)
    told.ops["world:0>1#1F1B", STAGES, 0] = ("message(8 bytes)", Known.RESULT)
    told.channels["world:0>1#1F1B"] = [0, 1]
    plan = plan_recovery([told, talking(7, fresh=True, rank=1)])
    assert [(t.name[1:], t.targets) for t in plan.results] == [((STAGES, 0), (1,))]


def test_two_ends_that_disagree_about_a_message_are_told_so():
    small = talking(5, awaited=(0,), rank=1)
    small.ops["world:0>1#0", 5, 0] = ("message(4 bytes)", Known.NOTHING)
    with pytest.raises(CollectiveError, match=r"issued message\(8 bytes\).*message\(4 bytes\)"):
        plan_recovery([talking(5, sent=(0,)), small])


def test_a_step_that_a_survivor_has_no_log_of_is_not_executed_again():
    table = ["a", "b", "c"]
    report_of = {"fresh": False, "donor": True, "groups": {WORLD: [0, 1, 2]}, "shards": table}
    begun = RankReport(commits=6, since=6, **report_of)
    with pytest.raises(RecoveryError):
        plan_recovery([begun, RankReport(commits=6, **report_of), shadowed(5, 4)])
    plan = plan_recovery([begun, RankReport(commits=6, **report_of), shadowed(6, 5)])
    assert plan.restores == {2: 6}
