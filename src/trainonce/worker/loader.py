"""The loader of a map-style dataset: sharded by rank, resumable at any step at no cost."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from trainonce.errors import DataError
from trainonce.worker.loading import LoadingTimes
from trainonce.worker.sampler import Order, global_batch_size, num_steps, share
from trainonce.worker.seeds import derive_seed, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_STATEFUL_HINT = (
    "make it a map-style dataset (__len__ and __getitem__), or pass a loader with state_dict and "
    "load_state_dict, such as torchdata's StatefulDataLoader"
)


class ShardedLoader:
    """Batches of a map-style dataset, each sample exactly once an epoch over all ranks.

    Every rank takes the same number of steps. Nothing is dealt twice to even out the end of
    an epoch, and nothing is left out unless `drop_last` asks for it: the last global batch is
    dealt so that ranks differ by one sample at most.

    Loading a batch, collating included, runs under generators (Python's, NumPy's, torch's
    CPU one) seeded from (seed, epoch, offset, rank). So random augmentation is the same with
    any number of loader workers and after a resume, and the main process's own generators
    are not touched by it.

    Args:
        dataset: Has `__getitem__` and `__len__`, and `__getitems__` if it reads whole
            batches.
        batch_size: Samples a rank takes in a full step. May be set to another value between
            epochs, or before going on at an offset.
        shuffle: A new order each epoch.
        seed: The run's seed; the same on all ranks.
        world_size: Number of ranks.
        rank: This process's rank, or None until `bind` tells it.
        drop_last: Leave out the samples at the end that do not fill a step of all ranks.
        sampler: An iterable of indices that owns the order; see `trainonce.worker.sampler.Order`.
            It gives the order for all ranks together, not a rank's share.
        num_workers: Processes that load; 0 loads in this one.
        collate_fn: Makes a batch of a list of samples; torch's `default_collate` if None.
        pin_memory: As in `torch.utils.data.DataLoader`, like the rest.
        prefetch_factor: Batches that each loader process loads ahead.
        persistent_workers: Keep loader processes between epochs.
        timeout: Seconds to wait for a loader process; 0 for ever.
        worker_init_fn: Called in each loader process with its number.
        multiprocessing_context: How loader processes start.

    Raises:
        DataError: These arguments, or this dataset, cannot be sharded.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        seed: int,
        world_size: int,
        rank: int | None = None,
        drop_last: bool = False,
        sampler: Iterable[Any] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
    ) -> None:
        length = _length_of(dataset, sampler)
        if shuffle and sampler is not None:
            raise DataError("shuffle=True and a sampler both claim the order", hint="give one")
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self._epoch = 0
        self._rank: int | None = None
        self._world_size = world_size
        self._order = Order(length, seed=seed, shuffle=shuffle, sampler=sampler)
        self._order_name = type(sampler).__name__ if sampler is not None else str(shuffle)
        self.times = LoadingTimes()
        self._source = _SeededDataset(dataset, collate_fn or default_collate, self.times)
        self._batches = _Batches()
        self._generator = torch.Generator()  # else a DataLoader draws from the global one
        self.bind(rank, world_size)
        if length is not None:
            self._check_size(length)
        try:
            self._loader = DataLoader(
                self._source,
                batch_sampler=self._batches,  # pyright: ignore[reportArgumentType]
                collate_fn=_itself,
                num_workers=num_workers,
                pin_memory=pin_memory,
                prefetch_factor=prefetch_factor,
                persistent_workers=persistent_workers,
                timeout=timeout,
                worker_init_fn=worker_init_fn,
                multiprocessing_context=multiprocessing_context,
                generator=self._generator,
            )
        except (ValueError, TypeError) as error:
            raise DataError(f"these loader options do not go together: {error}") from error

    @property
    def batch_size(self) -> int:
        """Samples that a rank takes in a full step."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(
                f"batch_size is {value!r}", hint="give a whole number of samples a rank, at least 1"
            )
        self._batch_size = value

    def bind(self, rank: int | None, world_size: int) -> None:
        """Say which share is this process's. Until then it can plan, but not iterate.

        Raises:
            DataError: `rank` is not one of the ranks.
        """
        if world_size < 1 or (rank is not None and not 0 <= rank < world_size):
            raise DataError(f"rank {rank} of {world_size} does not exist")
        self._rank = rank
        self._world_size = world_size

    def num_samples(self, epoch: int = 0) -> int:
        """Return the length of the order in `epoch`, before `drop_last`."""
        return len(self._order.of_epoch(epoch))

    def identity(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, and when a run is resumed, as plain values."""
        return {"seed": self.seed, "samples": self.num_samples(0), "order": self._order_name}

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next plain `for batch in loader` walks through."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of steps of an epoch, the same on every rank."""
        samples = self.num_samples(self._epoch)
        return num_steps(samples, self._batch_size, self._world_size, drop_last=self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epoch
        self._epoch += 1
        return (batch for batch, _next_offset in self.iterate(epoch))

    def iterate(self, epoch: int, offset: int = 0) -> Iterator[tuple[Any, int]]:
        """Yield the rest of `epoch` from `offset` on, without touching what came before.

        Args:
            epoch: Counts from 0.
            offset: Samples of the order that all ranks together have consumed.

        Yields:
            A batch, and the offset once that batch is consumed. Loader workers read ahead;
            the offset counts what was yielded only.

        Raises:
            DataError: The rank is not known yet, or `offset` lies outside the epoch.
        """
        if self._rank is None:
            raise DataError(
                "this process holds no rank yet, so it has no share of the data",
                hint="iterate over run.batches(loader): a hot spare waits there for its rank",
            )
        plan = self._batches.plan = self._plan(epoch, offset, self._rank)
        self._generator.manual_seed(derive_seed("workers", self.seed, epoch, self._rank))
        source = iter(self._loader)
        try:
            for batch in source:
                yield batch, plan.ends.popleft()
        finally:
            # Now, and not when the collector comes by: an error's traceback may hold `source`.
            shutdown = getattr(source, "_shutdown_workers", None)
            if shutdown is not None and not self._loader.persistent_workers:
                shutdown()

    def sample_batch(self) -> Any:
        """Return rank 0's first batch of epoch 0, for a rehearsal.

        Loaded in this process, whatever `num_workers` is; the generators are left as they were.
        """
        return self._source.__getitems__(next(iter(self._plan(0, 0, 0))))

    def _plan(self, epoch: int, offset: int, rank: int) -> _Plan:
        order = self._order.of_epoch(epoch)
        self._check_size(len(order))
        if not 0 <= offset <= len(order):
            raise DataError(
                f"offset {offset} lies outside epoch {epoch}, which has {len(order)} samples",
                hint="go on with the dataset and sampler that the run began with",
            )
        return _Plan(
            order=order,
            seed=self.seed,
            epoch=epoch,
            offset=offset,
            rank=rank,
            world_size=self._world_size,
            batch_size=self._batch_size,
            drop_last=self.drop_last,
        )

    def _check_size(self, num_samples: int) -> None:
        needed = self._world_size * (self._batch_size if self.drop_last else 1)
        if num_samples < needed:
            kind = "with drop_last, one full batch a rank" if self.drop_last else "one a rank"
            raise DataError(
                f"{num_samples} samples are too few for {self._world_size} ranks: it takes at "
                f"least {needed} ({kind})",
                hint="use fewer ranks, a smaller batch_size, or a larger dataset",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """One rank's batches of the rest of an epoch, as (seed, indices); `ends` are their offsets.

    It knows nothing of the loader: persistent workers hold on to it, and a cycle would keep
    them running until the collector comes by.
    """

    order: Sequence[Any]
    seed: int
    epoch: int
    offset: int
    rank: int
    world_size: int
    batch_size: int
    drop_last: bool
    ends: collections.deque[int] = dataclasses.field(default_factory=collections.deque)

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        offset, total = self.offset, len(self.order)
        while size := global_batch_size(
            total - offset, self.batch_size, self.world_size, drop_last=self.drop_last
        ):
            key = derive_seed("batch", self.seed, self.epoch, offset, self.rank)
            indices = share(self.order[offset : offset + size], self.rank, self.world_size)
            offset += size
            self.ends.append(offset)
            yield key, indices
        if offset < total and not self.drop_last:
            warnings.warn(
                f"epoch {self.epoch} was resumed by {self.world_size} ranks with "
                f"{total - offset} samples left: too few to deal, so they are skipped",
                stacklevel=2,
            )


class _Batches:
    """The batch sampler that a DataLoader keeps: walks through the plan that was set last."""

    def __init__(self) -> None:
        self.plan: Iterable[tuple[int, list[Any]]] = ()

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        return iter(self.plan)  # a DataLoader with workers asks twice, and takes the second


class _SeededDataset(Dataset[Any]):
    """Loads and collates a batch under its own seed; for anything else it is the dataset.

    Code in `worker_init_fn` reaches the dataset through `get_worker_info().dataset`, which is
    this object, and reads and sets attributes there.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], times: LoadingTimes
    ) -> None:
        self.__dict__.update(_dataset=dataset, _collate=collate, _times=times)

    def __reduce__(self) -> tuple[Any, ...]:
        return _SeededDataset, (self._dataset, self._collate, self._times)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __getitems__(self, keyed: tuple[int, Sequence[Any]]) -> Any:
        seed, indices = keyed
        read_many = getattr(self._dataset, "__getitems__", None)

        def read() -> Any:
            if read_many is not None:
                return self._collate(read_many(indices))
            return self._collate([self._dataset[index] for index in indices])

        with seeded(seed):
            return self._times.load(len(indices), read)


def _itself(batch: Any) -> Any:
    return batch


def _length_of(dataset: Any, sampler: Iterable[Any] | None) -> int | None:
    """Return the dataset's length, or None where a sampler owns the order.

    Raises:
        DataError: It is not a map-style dataset, or has no length and needs one.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{type(dataset).__name__} is not a map-style dataset: its position cannot be restored",
            hint=_STATEFUL_HINT,
        )
    if sampler is not None:
        return None
    try:
        return len(dataset)
    except TypeError as error:
        raise DataError(
            f"{type(dataset).__name__} has no length, so its samples cannot be dealt to ranks",
            hint="give it __len__, or pass a sampler",
        ) from error
