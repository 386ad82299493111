"""Which sample comes when, and which rank gets it.

An epoch is one *order* of samples, the same on all ranks. It is cut into *global batches*,
one a step, and each of those is dealt out to the ranks. A position within the epoch is an
*offset*: how many samples of the order all ranks together have consumed. What comes next
follows from the offset alone, so a run goes on anywhere at no cost, and at any world size.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import DataError
from trainonce.worker.seeds import derive_seed, seeded

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

# A sampler that yields more than this many indices an epoch is taken for an endless one.
_ENDLESS = 1 << 28


def global_batch_size(remaining: int, batch_size: int, world_size: int, *, drop_last: bool) -> int:
    """Return how many samples the next step takes from the order, over all ranks.

    It is `batch_size * world_size` as long as there is more than that. At the end every rank
    still gets something, and nothing is dealt twice: a rest of at least one sample a rank
    is a step of its own, a smaller one joins the step before.

    Args:
        remaining: Samples left in the epoch.
        batch_size: Samples a rank takes in a full step.
        world_size: Number of ranks.
        drop_last: Leave out what does not fill a step.

    Returns:
        0 when the epoch is over. `remaining` below `world_size` is over too: there is no
        fair way to deal it, which happens only where an epoch is resumed by more ranks.
    """
    full = batch_size * world_size
    if drop_last:
        return full if remaining >= full else 0
    if remaining < world_size:
        return 0
    return full if remaining == full or remaining >= full + world_size else remaining


def num_steps(num_samples: int, batch_size: int, world_size: int, *, drop_last: bool) -> int:
    """Return the number of steps of an epoch, the same for every rank."""
    full_steps, rest = divmod(num_samples, batch_size * world_size)
    if drop_last or (full_steps and rest < world_size):
        return full_steps
    return full_steps + (rest >= world_size)


def share(global_batch: Sequence[Any], rank: int, world_size: int) -> list[Any]:
    """Return the part of a global batch that `rank` computes.

    Every `world_size`-th sample, as `DistributedSampler` deals them. Sizes differ by one at
    most.
    """
    part = global_batch[rank::world_size]
    return part.tolist() if isinstance(part, torch.Tensor) else list(part)


class Order:
    """The order of samples in each epoch: sequential, shuffled, or a sampler's own.

    Shuffled: `torch.randperm` of a `torch.Generator` seeded with
    `derive_seed("order", seed, epoch)`.

    Args:
        num_samples: Length of the dataset; None where only the sampler knows.
        seed: The run's seed.
        shuffle: A new permutation each epoch.
        sampler: An iterable of indices that owns the order. It is read whole, once an
            epoch, after `set_epoch(epoch)` where it has that, under generators seeded from
            (seed, epoch), its own `generator` attribute included. So torch's random
            samplers are alike on all ranks, and after a resume. Weights or other state that
            it draws from may change between epochs, not within one.
    """

    def __init__(
        self,
        num_samples: int | None,
        *,
        seed: int,
        shuffle: bool = False,
        sampler: Iterable[Any] | None = None,
    ) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle
        self._sampler = sampler
        self._cached: tuple[int, Sequence[Any]] | None = None

    def of_epoch(self, epoch: int) -> Sequence[Any]:
        """Return the indices of `epoch` in order; the last epoch asked for is kept.

        Raises:
            DataError: The sampler does not come to an end.
        """
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._make(epoch))
        return self._cached[1]

    def _make(self, epoch: int) -> Sequence[Any]:
        seed = derive_seed("order", self._seed, epoch)
        if self._sampler is not None:
            return _read_sampler(self._sampler, epoch, seed)
        if self._num_samples is None:
            raise DataError("the dataset has no length, and there is no sampler")
        if self._shuffle:
            generator = torch.Generator().manual_seed(seed)
            # A tensor slices like a sequence, in an eighth of a list's memory.
            return torch.randperm(self._num_samples, generator=generator)  # pyright: ignore[reportReturnType]
        return range(self._num_samples)


def _read_sampler(sampler: Iterable[Any], epoch: int, seed: int) -> list[Any]:
    set_epoch = getattr(sampler, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    with seeded(seed), _seeded_generator(getattr(sampler, "generator", None), seed):
        indices = list(itertools.islice(sampler, _ENDLESS + 1))
    if len(indices) > _ENDLESS:
        raise DataError(
            f"the sampler {type(sampler).__name__} yields more than {_ENDLESS} indices an epoch",
            hint="let it end, and iterate over as many epochs as needed",
        )
    return indices


@contextlib.contextmanager
def _seeded_generator(generator: object, seed: int) -> Generator[None]:
    """Seed a sampler's own generator, if it has one, and give it back as it was."""
    if not isinstance(generator, torch.Generator):
        yield
        return
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
