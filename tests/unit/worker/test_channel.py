"""The two ends of a channel: what each logs of its messages, and what goes out again."""

import pytest
import torch

from trainonce.errors import CollectiveError
from trainonce.worker import oplog
from trainonce.worker.buffers import BufferPool
from trainonce.worker.channel import Channel
from trainonce.worker.operation import RECEIVE, SEND, SETUP, STAGES, Known, Op, OpState
from trainonce.worker.oplog import GroupLog

WORLD = GroupLog("world", [4, 5, 6], spans_world=True)


def channel(*, sends, taken=(), stages=""):
    return Channel(WORLD, 0, 2, 0, sends=sends, stages=stages, taken=set(taken))


def message(kind, size=8):
    buffers = [torch.zeros(size, dtype=torch.uint8)] if kind == SEND else []
    return Op(
        kind, f"message({size} bytes)", lambda _: (None, []), lambda _: None, [],
        torch.futures.Future(), buffers=buffers,
    )  # fmt: skip


def known(log, intervals):
    return {(interval, seq): Known(what) for interval, seq, _, what in log.describe(intervals)}


def test_both_ends_have_one_name_and_the_global_ranks():
    ends = [channel(sends=True), channel(sends=False)]
    assert {each.key for each in ends} == {"world:0>2#0"}
    assert ends[0].ranks == [4, 6]
    assert channel(sends=True, stages="1F1B").key != ends[0].key


def test_a_sender_can_give_what_it_has_logged_before_it_went_out():
    log, op = channel(sends=True), message(SEND)
    assert log.add(op, 5)
    assert known(log, {5}) == {(5, 0): Known.RESULT}
    assert log.pending() == []
    assert log.to_issue() == [op]
    assert log.to_issue() == []


def test_a_receiver_has_what_has_arrived_and_cannot_give_it():
    log, ops = channel(sends=False), [message(RECEIVE), message(RECEIVE)]
    assert not any(log.add(op, 5) for op in ops)
    assert log.to_issue() == ops
    ops[0].state = OpState.DONE
    assert known(log, {5}) == {(5, 0): Known.TAKEN, (5, 1): Known.NOTHING}
    ops[1].work = object()
    assert log.to_issue() == []


def test_what_was_handed_over_in_a_recovery_does_not_go_out_again():
    log, ops = channel(sends=True), [message(SEND) for _ in range(3)]
    log.add(ops[0], 5)
    log.hand_over()
    log.add(ops[1], 5)
    log.add(ops[2], 5)
    log.taken.add((5, 1))
    log.drop_taken()
    assert log.to_issue() == [ops[2]]


def test_a_new_sender_logs_what_has_arrived_without_sending_it():
    log, ops = channel(sends=True, taken={(5, 0)}), [message(SEND), message(SEND)]
    assert all(log.add(op, 5) for op in ops)
    assert log.to_issue() == ops[1:]
    assert set(known(log, {5}).values()) == {Known.RESULT}


def test_a_new_receiver_gets_a_message_that_came_before_it_asked():
    log, op = channel(sends=False), message(RECEIVE)
    log.unclaimed[5, 0] = ("message(8 bytes)", [torch.ones(8, dtype=torch.uint8)])
    assert known(log, {5}) == {(5, 0): Known.TAKEN}
    assert log.add(op, 5)
    assert op.buffers[0].sum() == 8
    log.unclaimed[5, 1] = ("message(4 bytes)", [torch.ones(4, dtype=torch.uint8)])
    with pytest.raises(CollectiveError, match="message\\(8 bytes\\) here"):
        log.add(message(RECEIVE), 5)


@pytest.mark.parametrize("kind", [SEND, RECEIVE])
def test_both_ends_can_give_what_stages_said_when_they_got_ready(kind):
    log, op = channel(sends=kind == SEND, stages="1F1B"), message(kind)
    log.add(op, STAGES)
    op.state = OpState.DONE
    log.unclaimed[STAGES, 1] = ("message of stages", [torch.zeros(8, dtype=torch.uint8)])
    assert set(known(log, {STAGES}).values()) == {Known.RESULT}


def test_what_one_end_has_sent_and_the_other_received_cancels_out():
    ends = [channel(sends=True), channel(sends=False)]
    for log, kind in zip(ends, (SEND, RECEIVE), strict=True):
        log.add(message(kind), SETUP)
        log.add(message(kind), 5)
    assert [log.num_issued(5) for log in ends] == [1, 1]
    assert ends[0].balance(5) > 0
    assert sum(log.balance(5) for log in ends) == 0
    ends[0].add(message(SEND), 5)
    assert sum(log.balance(5) for log in ends) != 0


def test_an_abandoned_channel_lets_go_of_what_was_under_way():
    log, op = channel(sends=True), message(SEND)
    log.add(op, 5)
    op.work = work = object()
    assert log.abandon() == [work]
    assert op.work is None
    assert known(log, {5}) == {(5, 0): Known.RESULT}


def test_the_copies_of_committed_steps_are_freed():
    log, pool = channel(sends=True), BufferPool()
    log.add(message(SEND), SETUP)
    log.add(message(SEND), 5)
    log.add(message(SEND), 6)
    log.release_before(6, pool)
    assert known(log, {SETUP, 5, 6}).keys() == {(SETUP, 0), (6, 0)}


def test_messages_outside_of_steps_stay_until_they_are_known_to_have_arrived(monkeypatch):
    monkeypatch.setattr(oplog, "MOST_OUTSIDE_BYTES", 100)
    ends, pool = [channel(sends=True), channel(sends=False)], BufferPool()
    for log, kind in zip(ends, (SEND, RECEIVE), strict=True):
        for _ in range(20):
            op = message(kind)
            log.add(op, 5)
            log.close(op)
    assert not any(log.drop_if_too_many(5, pool) for log in ends)
    # The sender is done with each, and the inner group may still send it.
    assert all(op.buffers for op in ends[0].ops[5].values())
    assert sum(log.balance(5) for log in ends) == 0
