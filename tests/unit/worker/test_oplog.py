"""The order in which operations go out on a new inner group."""

import torch

from trainonce.worker.oplog import GroupLog, Op, bucket_order_interval


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
