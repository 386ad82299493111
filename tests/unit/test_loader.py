import random
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from trainonce.errors import DataError
from trainonce.worker.data import StatefulLoader, adapt_loader
from trainonce.worker.loader import ShardedLoader


class Noisy(Dataset):
    """Each sample: its index and a draw from each generator."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        draws = [random.random(), float(np.random.randn()), torch.rand(1).item()]
        return index, torch.tensor(draws, dtype=torch.float64)


def ids(batch) -> list[int]:
    return batch[0].tolist()


def plain(batch) -> tuple:
    return batch[0].tolist(), batch[1].tolist()


@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_is_dealt_exactly_once_an_epoch_whatever_the_remainder(
    world_size: int, shuffle: bool
) -> None:
    batch_size = 3
    for size in range(world_size, 2 * batch_size * world_size + world_size + 1):
        loaders = [
            ShardedLoader(
                range(size), batch_size, shuffle, seed=1, world_size=world_size, rank=rank
            )
            for rank in range(world_size)
        ]
        for epoch in (0, 1):
            steps = [[(batch, end) for batch, end in one.iterate(epoch)] for one in loaders]
            assert {len(taken) for taken in steps} == {len(loaders[0])}
            seen = [index for taken in steps for batch, _ in taken for index in batch.tolist()]
            assert sorted(seen) == list(range(size))
            for same_step in zip(*steps, strict=True):
                sizes = [len(batch) for batch, _ in same_step]
                assert max(sizes) - min(sizes) <= 1
                assert len({end for _, end in same_step}) == 1
            assert steps[0][-1][1] == size


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_after_any_step_gives_the_same_batches_bit_for_bit(num_workers: int) -> None:
    def make(workers: int = 0) -> ShardedLoader:
        return ShardedLoader(Noisy(29), 4, True, seed=5, world_size=2, rank=1, num_workers=workers)

    whole = [(plain(batch), end) for batch, end in make().iterate(1)]
    offsets = [0, *(end for _, end in whole)]
    for done, offset in enumerate(offsets):
        rest = [(plain(batch), end) for batch, end in make(num_workers).iterate(1, offset)]
        assert rest == whole[done:]


def test_resuming_at_another_world_size_deals_the_rest_once() -> None:
    first = [ShardedLoader(range(50), 3, True, seed=2, world_size=4, rank=r) for r in range(4)]
    seen: list[int] = []
    offset = 0
    for loader in first:
        steps = loader.iterate(0)
        for _ in range(2):
            batch, offset = next(steps)
            seen += batch.tolist()
    assert offset == 24
    for rank in range(3):
        later = ShardedLoader(range(50), 5, True, seed=2, world_size=3, rank=rank)
        seen += [index for batch, _ in later.iterate(0, offset) for index in batch.tolist()]
    assert sorted(seen) == list(range(50))


def test_a_rest_too_small_for_more_ranks_is_skipped_with_a_word() -> None:
    loader = ShardedLoader(range(20), 1, seed=0, world_size=8, rank=0)
    with pytest.warns(UserWarning, match="8 ranks with 4 samples left"):
        assert list(loader.iterate(0, 16)) == []


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_augmentation_is_the_same_with_and_without_workers(context: str) -> None:
    def batches(**options) -> list[tuple]:
        loader = ShardedLoader(Noisy(17), 4, True, seed=9, world_size=2, rank=0, **options)
        return [plain(batch) for batch, _ in loader.iterate(0)]

    alone = batches()
    assert batches(num_workers=2, multiprocessing_context=context, prefetch_factor=3) == alone
    numbers = [draw for batch in alone for sample in batch[1] for draw in sample]
    assert len(set(numbers)) == len(numbers)


def test_ranks_and_epochs_draw_different_numbers() -> None:
    draws = set()
    for rank in (0, 1):
        for epoch in (0, 1):
            loader = ShardedLoader(Noisy(8), 2, seed=9, world_size=2, rank=rank)
            draws |= {row[2] for batch in loader.iterate(epoch) for row in plain(batch[0])[1]}
    assert len(draws) == 2 * 8


def noisy_collate(samples):
    return torch.tensor([random.random() + torch.rand(1).item() for _ in samples])


def test_a_collate_function_draws_under_the_same_seed() -> None:
    def batches(num_workers: int) -> list[list[float]]:
        loader = ShardedLoader(
            Noisy(9), 2, seed=1, world_size=1, rank=0, num_workers=num_workers,
            collate_fn=noisy_collate,
        )  # fmt: skip
        return [batch.tolist() for batch in loader]

    assert batches(0) == batches(2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_main_generators_as_they_were(num_workers: int) -> None:
    loader = ShardedLoader(Noisy(9), 2, True, seed=1, world_size=1, rank=0, num_workers=num_workers)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    loader.sample_batch()
    assert len(list(loader)) == 5
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_the_sample_batch_is_rank_0s_first_and_needs_no_rank() -> None:
    options = {"seed": 3, "world_size": 2, "num_workers": 2}
    spare = ShardedLoader(Noisy(9), 2, True, **options)
    first, _ = next(ShardedLoader(Noisy(9), 2, True, rank=0, **options).iterate(0))
    assert plain(spare.sample_batch()) == plain(first)
    assert len(spare) == 2


def test_without_a_rank_iterating_says_what_to_do_and_binding_helps() -> None:
    spare = ShardedLoader(range(8), 2, seed=0, world_size=2)
    with pytest.raises(DataError, match=r"run\.batches"):
        next(spare.iterate(0))
    spare.bind(1, 2)
    assert [batch.tolist() for batch in spare] == [[1, 3], [5, 7]]


def test_plain_iteration_walks_through_one_epoch_after_another() -> None:
    loader = ShardedLoader(range(12), 4, True, seed=0, world_size=1, rank=0)
    epochs = [[index for batch in loader for index in batch.tolist()] for _ in range(2)]
    assert epochs[0] != epochs[1]
    loader.set_epoch(0)
    assert [index for batch in loader for index in batch.tolist()] == epochs[0]


def test_the_batch_size_may_change_before_going_on() -> None:
    loader = ShardedLoader(range(20), 2, seed=0, world_size=2, rank=0)
    steps = loader.iterate(0)
    offset = [next(steps)[1] for _ in range(2)][-1]
    loader.batch_size = 4
    assert [len(batch) for batch, _ in loader.iterate(0, offset)] == [4, 2]
    with pytest.raises(DataError, match="batch_size is 0"):
        loader.batch_size = 0


def test_a_sampler_owns_the_order_of_all_ranks_together() -> None:
    order = [5, 5, 1, 3, 0, 2]
    parts = [
        [
            b.tolist()
            for b in ShardedLoader(range(6), 2, seed=0, world_size=2, rank=rank, sampler=order)
        ]
        for rank in (0, 1)
    ]
    assert parts == [[[5, 1], [0]], [[5, 3], [2]]]


def test_persistent_workers_serve_another_epoch_after_one_was_left_early() -> None:
    loader = ShardedLoader(
        Noisy(40), 2, True, seed=1, world_size=1, rank=0, num_workers=2, persistent_workers=True
    )
    twin = ShardedLoader(Noisy(40), 2, True, seed=1, world_size=1, rank=0)
    steps = loader.iterate(0)
    next(steps)
    steps.close()
    for epoch in (1, 2):
        expected = [(plain(batch), end) for batch, end in twin.iterate(epoch)]
        assert [(plain(batch), end) for batch, end in loader.iterate(epoch)] == expected


class ReadsMany(Noisy):
    def __getitems__(self, indices: list[int]):
        return [(index * 10, torch.rand(1)) for index in indices]


def test_a_dataset_that_reads_whole_batches_does_so() -> None:
    loader = ShardedLoader(ReadsMany(4), 2, seed=0, world_size=1, rank=0)
    assert [ids(batch) for batch in loader] == [[0, 10], [20, 30]]


class Opened(Noisy):
    def __getitem__(self, index: int):
        return index, torch.tensor(self.handle)


def open_handle(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info.dataset.size == 4
    info.dataset.handle = 7


def test_worker_init_fn_reaches_the_dataset() -> None:
    loader = ShardedLoader(
        Opened(4), 2, seed=0, world_size=1, rank=0, num_workers=1, worker_init_fn=open_handle
    )
    assert [batch[1].tolist() for batch in loader] == [[7, 7], [7, 7]]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class NoLength:
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": Endless()}, "map-style"),
        ({"dataset": iter([1])}, "map-style"),
        ({"dataset": NoLength()}, "no length"),
        ({"dataset": range(2)}, "2 samples are too few for 3 ranks: it takes at least 3"),
        ({"dataset": range(5), "drop_last": True, "batch_size": 2}, "at least 6"),
        ({"dataset": range(9), "batch_size": 0}, "batch_size is 0"),
        ({"dataset": range(9), "batch_size": 2.0}, "batch_size is 2.0"),
        ({"dataset": range(9), "shuffle": True, "sampler": [1]}, "both claim"),
        ({"dataset": range(9), "rank": 3}, "rank 3 of 3"),
        ({"dataset": range(9), "prefetch_factor": 2}, "do not go together"),
        ({"dataset": range(9), "num_workers": -1}, "do not go together"),
        ({"dataset": range(9), "persistent_workers": True}, "do not go together"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_reason(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ShardedLoader(**{"seed": 0, "world_size": 3, **arguments})


def test_an_offset_outside_the_epoch_is_refused() -> None:
    loader = ShardedLoader(range(8), seed=0, world_size=1, rank=0)
    with pytest.raises(DataError, match="offset 9 lies outside epoch 0, which has 8"):
        next(loader.iterate(0, 9))


# ------------------------------------------------------------------ loaders of others


DATA = TensorDataset(torch.arange(12))


@pytest.mark.parametrize(
    ("loader", "shuffled"),
    [
        (DataLoader(DATA, 2), False),
        (DataLoader(DATA, 2, shuffle=True), True),
        (DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 3, 0, shuffle=True)), True),
        (DataLoader(DATA, 2, sampler=DistributedSampler(DATA, 3, 0, shuffle=False)), False),
    ],
)
def test_a_torch_dataloader_is_dealt_anew(loader: DataLoader, shuffled: bool) -> None:
    parts = [adapt_loader(loader, seed=1, world_size=2, rank=rank) for rank in (0, 1)]
    dealt = [[i for (batch,), _ in part.iterate(0) for i in batch.tolist()] for part in parts]
    assert sorted(sum(dealt, [])) == list(range(12))
    assert (dealt[0] != list(range(0, 12, 2))) == shuffled


def test_a_torch_dataloaders_settings_are_taken_over() -> None:
    weighted = WeightedRandomSampler([1.0] * 12, 7)
    loader = DataLoader(
        DATA, 3, sampler=weighted, drop_last=True, num_workers=1, collate_fn=noisy_collate
    )
    ours = adapt_loader(loader, seed=1, world_size=1, rank=0)
    assert [len(batch) for batch in ours] == [3, 3]
    partial = adapt_loader(
        DataLoader(DATA, 2, sampler=RandomSampler(DATA, num_samples=5)),
        seed=1,
        world_size=1,
        rank=0,
    )
    assert partial.num_samples() == 5


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([1, 2, 3], "list cannot be restored"),
        (iter([1]), "cannot be restored"),
        (DataLoader(DATA, batch_size=None), "of its own"),
        (DataLoader(Endless(), 2), "map-style"),
    ],
)
def test_a_loader_whose_position_is_lost_is_refused(loader: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        adapt_loader(loader, seed=0, world_size=1)


def test_a_batch_sampler_of_its_own_is_refused() -> None:
    class Mine(BatchSampler):
        pass

    loader = DataLoader(DATA, batch_sampler=Mine(RandomSampler(DATA), 2, False))
    with pytest.raises(DataError, match="of its own"):
        adapt_loader(loader, seed=0, world_size=1)


class Counting:
    """The least that a stateful loader can be: ten numbers and a draw, from where it is."""

    def __init__(self) -> None:
        self.position = 0
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def __iter__(self):
        while self.position < 10:
            self.position += 1
            yield self.epoch, self.position, torch.rand(1).item()
        self.position = 0


def test_a_stateful_loader_goes_on_in_another_process_after_any_batch() -> None:
    whole = StatefulLoader(Counting(), seed=1, rank=2)
    reference = [list(whole.iterate(epoch)) for epoch in (0, 1)]
    running = adapt_loader(Counting(), seed=1, world_size=4, rank=2)
    for epoch in (0, 1):
        steps = running.iterate(epoch)
        for done in range(11):
            newcomer = StatefulLoader(Counting(), seed=1)
            newcomer.bind(2, 4)
            newcomer.load_local_state(running.local_state())
            assert list(newcomer.iterate(epoch, done)) == reference[epoch][done:]
            assert next(steps, None) == (reference[epoch] + [None])[done]


def test_a_stateful_loader_without_the_state_of_a_position_is_refused() -> None:
    loader = StatefulLoader(Counting(), seed=1)
    with pytest.raises(DataError, match="not of epoch 0, batch 4"):
        next(loader.iterate(0, 4))


def test_a_sample_batch_does_not_move_a_stateful_loader() -> None:
    loader = StatefulLoader(Counting(), seed=1)
    before = torch.get_rng_state()
    assert loader.sample_batch()[1] == 1
    assert next(loader.iterate(0))[0][1] == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchdatas_stateful_dataloader_goes_on_after_any_batch(num_workers: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> StatefulLoader:
        torch.manual_seed(0)  # its sampler draws a seed when it is made
        inner = torchdata.StatefulDataLoader(
            list(range(11)), batch_size=2, shuffle=True, num_workers=num_workers
        )
        return adapt_loader(inner, seed=4, world_size=1, rank=0)

    whole = make()
    reference = [[(b.tolist(), end) for b, end in whole.iterate(epoch)] for epoch in (0, 1)]
    assert reference[0] != reference[1]
    running = make()
    for epoch in (0, 1):
        steps = running.iterate(epoch)
        for done in range(7):
            if num_workers == 0 or done == 3:
                newcomer = make()
                newcomer.load_local_state(running.local_state())
                rest = [(b.tolist(), end) for b, end in newcomer.iterate(epoch, done)]
                assert rest == reference[epoch][done:]
            next(steps, None)
