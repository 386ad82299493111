"""What is kept of operations, and the order in which they go out on a new inner group."""

import torch

from trainonce.worker import oplog
from trainonce.worker.buffers import BufferPool
from trainonce.worker.operation import SETUP, Op, OpState, bucket_order_interval
from trainonce.worker.oplog import GroupLog


def op(kind):
    return Op(
        kind=kind,
        signature=kind,
        launch=lambda inner: (None, []),
        deliver=lambda result: None,
        value=[],
        future=torch.futures.Future(),
    )


def test_operations_go_out_again_in_the_order_in_which_the_script_issued_them():
    group = GroupLog("world", [0, 1], spans_world=True)
    group.add(op("poll"), 1)
    group.add(op("bucket order"), bucket_order_interval(0))
    group.add(op("gradients"), 1)
    assert [each.kind for each in group.to_issue()] == ["poll", "bucket order", "gradients"]


def test_of_too_many_operations_outside_of_steps_the_newer_half_is_kept(monkeypatch):
    monkeypatch.setattr(oplog, "MOST_OUTSIDE", 4)
    group, pool = GroupLog("world", [0, 1], spans_world=True), BufferPool()
    kept = []
    for count in range(1, 7):
        group.add(op("all_reduce"), 3)
        group.ops[3][count - 1].state = OpState.PENDING if count == 2 else OpState.DONE
        group.ops[3][count - 1].buffers = [pool.take(torch.zeros(8))]
        if group.drop_if_too_many(3, pool):
            kept.append((count, list(group.ops[3])))
    # What is pending stays. Later operations go on with the numbers that other ranks use.
    assert kept == [(5, [1, 2, 3, 4]), (6, [1, 3, 4, 5])]
    assert group.num_issued(3) == 6
    assert pool.held_bytes <= 5 * 32
    group.release_before(4, pool)
    assert group.num_issued(3) == 0


def test_large_results_outside_of_steps_are_bounded_by_their_bytes_but_not_in_set_up(monkeypatch):
    monkeypatch.setattr(oplog, "MOST_OUTSIDE_BYTES", 100)
    group, pool = GroupLog("world", [0, 1], spans_world=True), BufferPool()
    for interval in (SETUP, 0):
        for seq in range(4):
            group.add(op("all_gather"), interval)
            group.ops[interval][seq].state = OpState.DONE
            group.ops[interval][seq].buffers = [torch.zeros(8)]
    assert not group.drop_if_too_many(SETUP, pool)
    assert group.drop_if_too_many(0, pool)
    assert [len(group.ops[interval]) for interval in (SETUP, 0)] == [4, 2]
