"""What the journal keeps, for whom, and until when."""

import pytest
import torch

from trainonce.worker.journal import Journal
from trainonce.worker.operation import SETUP, STAGES, Known, Op, OpState


def operation(**fields):
    return Op(
        "all_reduce", "all_reduce", lambda inner: (None, []), lambda result: None, [],
        torch.futures.Future(), **fields,
    )  # fmt: skip


@pytest.fixture
def journal():
    made = Journal(2)
    made.start_at(5)
    return made


def carry_out(journal, log, interval=None, **fields):
    """Log an operation, and let it have its result."""
    op = operation(**fields)
    journal.add(log, op, interval)
    op.buffers = [journal.pool.take(torch.empty(4))]
    journal.close(log, op)
    return op


def test_a_step_is_kept_until_all_ranks_have_issued_something_of_the_next(journal):
    ops = [carry_out(journal, journal.world) for _ in range(2)]
    journal.commit()
    own = journal.add_group("world/own", [0])
    carry_out(journal, own)
    assert [len(op.buffers) for op in ops] == [1, 1]
    carry_out(journal, journal.world)
    assert [len(op.buffers) for op in ops] == [0, 0]
    assert list(journal.world.ops) == [6]


def test_where_shadows_are_kept_a_step_stays_until_an_operation_settles_it(journal):
    journal.keeps_step = True
    op = carry_out(journal, journal.world, early=True)
    journal.commit()
    carry_out(journal, journal.world)
    assert op.buffers
    carry_out(journal, journal.world, settles=True)
    assert not op.buffers


def test_what_is_complete_everywhere_before_the_commit_is_freed_by_it(journal):
    early, late = carry_out(journal, journal.world, early=True), carry_out(journal, journal.world)
    journal.commit()
    assert (early.buffers, len(late.buffers)) == ([], 1)


def test_operations_of_the_runtime_do_not_count_as_issued(journal):
    for fields in ({}, {"settles": True}, {}):
        carry_out(journal, journal.world, **fields)
    carry_out(journal, journal.add_group("world/own", [0]))
    assert journal.num_issued == 2
    journal.commit()
    assert journal.num_issued == 0


def test_a_result_waits_for_the_group_that_the_script_has_not_made_yet(journal):
    name, outcome = ("world/late", SETUP, 0), ("all_reduce", [torch.ones(4)])
    journal.members["world/late"] = [0, 1]
    assert journal.place(name, outcome) is None
    assert journal.reported_intervals() == {SETUP, STAGES, 4, 5}
    assert journal.describe({SETUP}, rank=0) == {name: ("all_reduce", Known.RESULT)}
    assert journal.groups_known()["world/late"] == [0, 1]
    assert journal.result(name) == outcome[1]
    group, op = journal.add_group("world/late", [0, 1]), operation()
    assert journal.unclaimed == {}
    assert journal.knows(SETUP)
    assert journal.add(group, op, SETUP)
    assert op.buffers == outcome[1]


def test_a_message_that_waits_for_its_channel_can_be_given_by_its_source_only(journal):
    key = "world:0>1#0"
    journal.ends[key] = [0, 1]
    journal.place((key, 5, 0), ("message(4 bytes)", [torch.ones(4)]))
    known = [journal.describe({5}, rank)[key, 5, 0][1] for rank in (0, 1)]
    assert known == [Known.RESULT, Known.TAKEN]
    assert journal.channels_known() == {key: [0, 1]}
    made = journal.channel(journal.world, 0, 1, 0, sends=False, stages="")
    assert list(made.unclaimed) == [(5, 0)]


def test_results_that_nobody_asked_for_go_with_their_step(journal):
    held = journal.pool.held_bytes
    for interval in (SETUP, 5, 6):
        for key in ("world", "world/late"):
            journal.place((key, interval, 0), ("all_reduce", [torch.ones(4)]))
    assert journal.pool.held_bytes == held + 6 * 16
    journal.commit()
    carry_out(journal, journal.world, interval=SETUP)
    op = operation()
    assert journal.add(journal.world, op, None)
    journal.close(journal.world, op)
    assert list(journal.unclaimed["world/late"]) == [(SETUP, 0), (6, 0)]
    assert not journal.world.unclaimed


def test_a_result_from_another_rank_goes_to_who_waits_for_it_once(journal):
    op = operation()
    journal.add(journal.world, op, None)
    name, outcome = ("world", 5, 0), ("all_reduce", [torch.ones(4)])
    assert journal.place(name, outcome) == (journal.world, op)
    assert (op.state, op.buffers) == (OpState.DELIVERING, outcome[1])
    assert journal.place(name, outcome) is None
    assert journal.unfinished() == [(journal.world, op)]
    journal.close(journal.world, op)
    assert journal.unfinished() == []


def test_what_stages_said_in_an_earlier_turn_goes_with_the_step_of_the_next(journal):
    for turn in ("pipe/1", "pipe/2"):
        journal.retire_stages("pipe", turn)
        journal.channel(journal.world, 0, 1, 0, sends=True, stages=turn)
        carry_out(journal, journal.world)
        assert len(journal.channels) == int(turn[-1])
        journal.commit()
    carry_out(journal, journal.world)
    assert [channel.stages for channel in journal.channels.values()] == ["pipe/2"]
