"""What a session asks of a loader, and how loaders that are not ours meet it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from trainonce.errors import DataError
from trainonce.worker.loader import _STATEFUL_HINT, ShardedLoader
from trainonce.worker.seeds import derive_seed, seeded

if TYPE_CHECKING:
    from collections.abc import Iterator


class Loader(Protocol):
    """What a session asks of a loader."""

    def bind(self, rank: int | None, world_size: int) -> None:
        """Say which rank this process holds; None while it holds none."""
        ...

    def iterate(self, epoch: int, offset: int = 0) -> Iterator[tuple[Any, int]]:
        """Yield (batch, the offset after it) for the rest of `epoch` from `offset` on."""
        ...

    def sample_batch(self) -> Any:
        """Return a batch for a rehearsal, and leave everything as it was."""
        ...


@dataclasses.dataclass(slots=True)
class StatefulPlace:
    """Where a loader of the user's own stands."""

    epoch: int = 0
    offset: int = 0
    state: Any = None
    """What it told of itself there; None before the first batch."""
    moved: bool = False
    """Whether it has still to be given that state."""


class StatefulLoader:
    """A loader of the user's own that can save and restore where it is.

    Any iterable with `state_dict` and `load_state_dict` in the manner of torchdata's
    `StatefulDataLoader`: a state that was taken after a batch was yielded, once loaded, makes
    the next `iter` go on with the batch after it, and one taken at the end of an epoch begins
    the next. Such a loader deals out its own data, so what each rank gets, and whether that is
    each sample once, is its own affair. Its offset counts the batches that this rank has got
    in the epoch.

    Loading runs under generators seeded from (seed, epoch), and from (seed, epoch, offset,
    rank) for each batch; the main process's generators are left as they were.

    Args:
        inner: The loader. `set_epoch(epoch)` is called where it, its sampler or its dataset
            has that.
        seed: The run's seed.
        rank: This process's rank, if it is known.
        place: Where another, which this one follows, has left the loader.
    """

    def __init__(
        self,
        inner: Any,
        *,
        seed: int,
        rank: int | None = None,
        place: StatefulPlace | None = None,
    ) -> None:
        self.inner = inner
        self.seed = seed
        self.place = place or StatefulPlace()
        self._rank = rank
        self._epoch = 0

    def bind(self, rank: int | None, world_size: int) -> None:
        """Say which rank this process holds; `world_size` is the inner loader's affair."""
        del world_size
        self._rank = rank

    def __len__(self) -> int:
        """Return the inner loader's length."""
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epoch
        self._epoch += 1
        return (batch for batch, _next_offset in self.iterate(epoch))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next plain `for batch in loader` walks through."""
        self._epoch = epoch

    def local_state(self) -> dict[str, Any]:
        """Return where this rank is, to be kept with its rank-local state."""
        place = self.place
        return {"epoch": place.epoch, "offset": place.offset, "state": place.state}

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Take over what `local_state` returned, in this process or another."""
        place = self.place
        place.epoch, place.offset, place.state = state["epoch"], state["offset"], state["state"]
        place.moved = True

    def iterate(self, epoch: int, offset: int = 0) -> Iterator[tuple[Any, int]]:
        """Yield (batch, the offset after it) for the rest of `epoch` from `offset` on.

        Raises:
            DataError: There is no state for this position.
        """
        place = self.place
        here = (place.epoch, place.offset) == (epoch, offset) and place.state is not None
        if here and (offset or place.moved):
            self.inner.load_state_dict(place.state)
            place.moved = False
        elif offset:
            raise DataError(
                f"the loader's state is of epoch {place.epoch}, batch {place.offset}, and not of "
                f"epoch {epoch}, batch {offset}",
                hint="call load_local_state with the state of that position first",
            )
        for part in (self.inner, getattr(self.inner, "sampler", None), self._dataset()):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        with seeded(derive_seed("iterate", self.seed, epoch)):
            source = iter(self.inner)
        while True:
            key = derive_seed("batch", self.seed, epoch, offset, self._rank or 0)
            try:
                with seeded(key):
                    batch = next(source)
                    state = self.inner.state_dict()
            except StopIteration:
                break
            offset += 1
            place.epoch, place.offset, place.state = epoch, offset, state
            yield batch, offset
        place.epoch, place.offset, place.state = epoch + 1, 0, self.inner.state_dict()

    def sample_batch(self) -> Any:
        """Return the next batch, and put the inner loader back to before it."""
        state = self.inner.state_dict()
        try:
            with seeded(derive_seed("sample", self.seed)):
                return next(iter(self.inner))
        finally:
            self.inner.load_state_dict(state)

    def _dataset(self) -> Any:
        return getattr(self.inner, "dataset", None)


def adapt_loader(
    loader: Any,
    *,
    seed: int,
    world_size: int,
    rank: int | None = None,
    place: StatefulPlace | None = None,
) -> ShardedLoader | StatefulLoader:
    """Return `loader` in a form whose position survives.

    A loader with `state_dict` and `load_state_dict` keeps its own ways. A plain
    `torch.utils.data.DataLoader` of a map-style dataset is read for its settings, and its
    order is dealt to the ranks anew: a sequential, random or distributed sampler becomes
    `shuffle`, any other sampler keeps the order.

    Args:
        loader: Any.
        seed: The run's seed.
        world_size: Number of ranks.
        rank: This process's rank, if it is known.
        place: Where `loader` was left, if it keeps its own ways and was adapted before.

    Raises:
        DataError: Its position cannot be restored; the hint says what can.
    """
    if isinstance(loader, ShardedLoader | StatefulLoader):
        loader.bind(rank, world_size)
        return loader
    if all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")):
        return StatefulLoader(loader, seed=seed, rank=rank, place=place)
    if not isinstance(loader, DataLoader):
        raise DataError(
            f"the position of {type(loader).__name__} cannot be restored: it has no state",
            hint="use run.dataloader(dataset, ...), or " + _STATEFUL_HINT,
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise DataError(
            "the DataLoader makes its batches in a way of its own (a batch_sampler, or no "
            "batch_size), which cannot be dealt to ranks",
            hint="use run.dataloader(dataset, batch_size=..., sampler=...)",
        )
    shuffle, sampler = _order_of(loader.sampler)
    return ShardedLoader(
        loader.dataset,
        loader.batch_size,
        shuffle,
        seed=seed,
        world_size=world_size,
        rank=rank,
        drop_last=loader.drop_last,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _order_of(sampler: Any) -> tuple[bool, Any]:
    """Return `(shuffle, sampler)` for the order that a DataLoader's sampler gives."""
    if type(sampler) is SequentialSampler:
        return False, None
    if type(sampler) is DistributedSampler:
        return sampler.shuffle, None
    if type(sampler) is RandomSampler and not sampler.replacement:
        whole = sampler.num_samples == len(sampler.data_source)
        return (True, None) if whole else (False, sampler)
    return False, sampler
