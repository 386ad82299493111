"""Which ranks hold the same part of split state, and how several give one part together."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainonce.errors import ConfigError
from trainonce.worker.shards import (
    copy_holders,
    describe_copies,
    describe_split,
    restore_split,
    shard_key,
    stripe,
)
from trainonce.worker.transfer import as_bytes


def tensors():
    return [
        ("scalar", torch.tensor(3.5)), ("nothing", torch.empty(0)), ("matrix", torch.randn(37, 5)),
        ("strided", torch.randn(6, 4).t()), ("flags", torch.tensor([True, False, True])),
        ("half", torch.randn(129).half()),
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_stripes_hold_every_byte_once(count):
    source = tensors()
    target = [(name, torch.zeros_like(tensor)) for name, tensor in source]
    sizes = []
    for index in range(count):
        given, taken = stripe(source, index, count), stripe(target, index, count)
        assert [name for name, _ in given] == [name for name, _ in taken]
        sizes.append(sum(tensor.nbytes for _, tensor in given))
        for (_, one), (_, two) in zip(given, taken, strict=True):
            two.copy_(one)
    for (name, one), (_, two) in zip(source, target, strict=True):
        assert torch.equal(one, two), name
    assert sum(sizes) == sum(tensor.nbytes for _, tensor in source)


def test_stripes_are_of_about_equal_size():
    whole = [("a", torch.zeros(1000)), ("b", torch.zeros(3000))]
    assert {sum(as_bytes(t).numel() for _, t in stripe(whole, i, 4)) for i in range(4)} == {4000}


@pytest.fixture
def on_rank():
    """Return a function that makes this process rank `rank` of a mesh, without any other."""

    def become(rank, shape, names):
        if dist.is_initialized():
            dist.destroy_process_group()
        size = torch.Size(shape).numel()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return init_device_mesh("cpu", shape, mesh_dim_names=names)

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def keys(on_rank, shape, names, placements):
    found = []
    for rank in range(torch.Size(shape).numel()):
        mesh = on_rank(rank, shape, names)
        split = DTensor.from_local(torch.zeros(2, 2), mesh, placements, run_check=False)
        found.append(shard_key([("w", split), ("plain", torch.zeros(2))], [], rank))
    return found


def test_ranks_at_the_same_place_on_every_axis_that_splits_hold_the_same(on_rank):
    a = keys(on_rank, (2, 2), ("rep", "shard"), [Replicate(), Shard(0)])
    assert a[0] == a[2] != a[1] == a[3]
    assert "" not in a
    b = keys(on_rank, (2, 3), ("shard", "rep"), [Shard(0), Replicate()])
    assert b[0] == b[1] == b[2] != b[3] == b[4] == b[5]
    both = keys(on_rank, (2, 2), ("a", "b"), [Shard(0), Shard(1)])
    assert len(set(both)) == 4


def test_what_no_axis_of_more_than_one_rank_splits_is_whole_everywhere(on_rank):
    assert set(keys(on_rank, (4, 1), ("rep", "shard"), [Replicate(), Shard(0)])) == {""}


def test_how_a_tensor_is_split_survives_the_wire(on_rank):
    mesh = on_rank(1, (2, 2), ("shard", "tp"))
    for placements in (
        [Shard(0), Replicate()],
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Replicate(), Shard(1)],
    ):
        tensor = DTensor.from_local(torch.randn(2, 2), mesh, placements, run_check=False)
        again = restore_split(tensor.to_local(), describe_split(tensor), tensor)
        assert again.placements == tensor.placements
        assert (again.shape, again.stride()) == (tensor.shape, tensor.stride())


def test_a_value_that_waits_for_a_reduction_is_no_state(on_rank):
    mesh = on_rank(0, (2,), ("a",))
    pending = DTensor.from_local(torch.zeros(2), mesh, [Partial()], run_check=False)
    with pytest.raises(ConfigError, match="which is no state"):
        describe_split(pending)


def test_copies_are_told_in_words_and_each_part_has_holders():
    assert describe_copies(["a", "b", "a", "b"]).endswith("2 parts with 2 living copies")
    assert describe_copies(["a", "b", "b"]).endswith(
        "1 part with 1 living copy, 1 part with 2 living copies"
    )
    assert copy_holders(["a", "b", "a", "b", "a", "b"], 2) == {0, 1, 2, 3}
    assert copy_holders(["", "", ""], 2) == {0, 1}
