import contextlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from trainonce.errors import DataError
from trainonce.worker.sampler import Order, global_batch_size, num_steps, share
from trainonce.worker.seeds import derive_seed, seeded

SIZES = {
    "num_samples": st.integers(0, 300),
    "batch_size": st.integers(1, 20),
    "world_size": st.integers(1, 9),
}


def sizes_from(offset: int, num_samples: int, batch: int, world: int, *, drop: bool) -> list[int]:
    found: list[int] = []
    while size := global_batch_size(num_samples - offset, batch, world, drop_last=drop):
        found.append(size)
        offset += size
    return found


@given(**SIZES)
def test_an_epoch_deals_every_sample_once_and_evenly(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    sizes = sizes_from(0, num_samples, batch_size, world_size, drop=False)
    assert sum(sizes) == (num_samples if num_samples >= world_size else 0)
    assert len(sizes) == num_steps(num_samples, batch_size, world_size, drop_last=False)
    full = batch_size * world_size
    assert all(size == full for size in sizes[:-1])
    for size in sizes:
        parts = [len(share(range(size), rank, world_size)) for rank in range(world_size)]
        assert min(parts) >= 1
        assert max(parts) - min(parts) <= 1
        assert max(parts) <= batch_size + 1
    dealt = [index for rank in range(world_size) for index in share(range(full), rank, world_size)]
    assert sorted(dealt) == list(range(full))


@given(**SIZES)
def test_drop_last_leaves_only_full_steps(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    sizes = sizes_from(0, num_samples, batch_size, world_size, drop=True)
    full = batch_size * world_size
    assert sizes == [full] * (num_samples // full)
    assert len(sizes) == num_steps(num_samples, batch_size, world_size, drop_last=True)


@given(**SIZES, later=st.integers(1, 9), data=st.data())
def test_what_follows_an_offset_is_what_would_have_followed_it(
    num_samples: int, batch_size: int, world_size: int, later: int, data: st.DataObject
) -> None:
    sizes = sizes_from(0, num_samples, batch_size, world_size, drop=False)
    done = data.draw(st.integers(0, len(sizes)))
    offset = sum(sizes[:done])
    assert sizes_from(offset, num_samples, batch_size, world_size, drop=False) == sizes[done:]
    rest = sizes_from(offset, num_samples, batch_size, later, drop=False)
    left = num_samples - offset
    assert sum(rest) == (left if left >= later else 0)


def test_full_batches_are_dealt_as_distributed_sampler_deals_them() -> None:
    data, world, batch = range(24), 3, 4
    for rank in range(world):
        theirs = list(DistributedSampler(data, world, rank, shuffle=False))
        ours = [share(range(start, start + 12), rank, world) for start in (0, 12)]
        assert sum(ours, []) == theirs
        assert len(ours[0]) == batch


def test_a_shuffled_order_is_a_permutation_that_seed_and_epoch_alone_decide() -> None:
    orders = {
        (seed, epoch): tuple(int(i) for i in Order(50, seed=seed, shuffle=True).of_epoch(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 4
    again = Order(50, seed=1, shuffle=True)
    again.of_epoch(0)
    assert tuple(int(i) for i in again.of_epoch(1)) == orders[1, 1]


def test_derived_seeds_and_orders_have_not_changed_since_they_were_first_released() -> None:
    assert derive_seed("order", 0, 0) == GOLDEN_SEED
    assert list(map(int, Order(8, seed=0, shuffle=True).of_epoch(0))) == GOLDEN_ORDER


GOLDEN_SEED = 13473245811430721989
GOLDEN_ORDER = [5, 4, 1, 7, 6, 3, 0, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomSampler(range(20)),
        lambda: RandomSampler(range(20), generator=torch.Generator().manual_seed(5)),
        lambda: RandomSampler(range(20), replacement=True, num_samples=7),
        lambda: SubsetRandomSampler(range(5, 15)),
        lambda: WeightedRandomSampler([0.1, 0.9, 0.5], 10),
    ],
)
def test_torchs_random_samplers_agree_between_processes_and_after_a_resume(make) -> None:
    first = Order(None, seed=3, sampler=make())
    orders = [first.of_epoch(epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    torch.rand(7)
    newcomer = Order(None, seed=3, sampler=make())
    assert newcomer.of_epoch(1) == orders[1]
    assert newcomer.of_epoch(0) == orders[0]


def test_reading_a_sampler_leaves_every_generator_as_it_was() -> None:
    own = torch.Generator().manual_seed(5)
    before = (own.get_state(), torch.get_rng_state(), random.getstate())
    Order(None, seed=3, sampler=RandomSampler(range(20), generator=own)).of_epoch(0)
    assert torch.equal(own.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]


def test_a_sampler_that_knows_epochs_is_told_and_its_variable_length_is_taken() -> None:
    class Growing:
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self):
            return iter(range(3 + self.epoch))

    order = Order(None, seed=0, sampler=Growing())
    assert [len(order.of_epoch(epoch)) for epoch in (0, 4)] == [3, 7]


def test_an_endless_sampler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainonce.worker.sampler._ENDLESS", 1000)

    class Endless:
        def __iter__(self):
            while True:
                yield 0

    with pytest.raises(DataError, match="Endless yields more than 1000"):
        Order(None, seed=0, sampler=Endless()).of_epoch(0)


def state_of_all() -> tuple:
    numpy_state = np.random.get_state()
    return (
        random.getstate(),
        torch.get_rng_state().tolist(),
        numpy_state[1].tolist(),
        numpy_state[2:],
    )


def draw() -> tuple:
    return (
        random.random(),
        random.gauss(),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
    )


def test_seeded_gives_the_same_numbers_and_leaves_the_generators_as_they_were() -> None:
    np.random.seed(1)
    np.random.randn()
    random.gauss()
    before = state_of_all()
    with seeded(7):
        first = draw()
    with contextlib.suppress(KeyError), seeded(7):
        second = draw()
        raise KeyError
    with seeded(8):
        other = draw()
    assert first == second
    assert set(first).isdisjoint(other)
    assert state_of_all() == before


def test_seeded_nests() -> None:
    with seeded(1):
        plain = [draw(), draw()]
    with seeded(1):
        first = draw()
        with seeded(2):
            draw()
        assert [first, draw()] == plain
