"""The loaders of a script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainonce.worker.data import adapt_loader

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.worker.data import StatefulLoader
    from trainonce.worker.loader import ShardedLoader
    from trainonce.worker.spare import Promotion


class Sources:
    """Loaders, numbered in the order of set-up, in which a successor numbers them alike.

    Args:
        seed: The run's seed.
        world_size: Number of ranks.
        promotion: The rank, now or later.
    """

    def __init__(self, seed: int, world_size: int, promotion: Promotion) -> None:
        self._seed = seed
        self._world_size = world_size
        self._promotion = promotion
        # By id, so the loaders are kept: an id may be used again once its object is gone.
        self._loaders: dict[int, tuple[int, Any]] = {}
        self._adapted: dict[int, ShardedLoader | StatefulLoader] = {}

    @property
    def rank(self) -> int | None:
        """The rank of this process; None while it has none."""
        return self._promotion.rank if self._promotion.done else None

    def number(self, loader: Any) -> int:
        """Return the number of `loader`, which gets the next one if it is new."""
        return self._loaders.setdefault(id(loader), (len(self._loaders), loader))[0]

    def adapt(self, loader: Any) -> ShardedLoader | StatefulLoader:
        """Return `loader` as one that can go on at any batch.

        Raises:
            DataError: It cannot say where it stands.
        """
        self.number(loader)
        found = self._adapted.get(id(loader))
        if found is None:
            found = self._adapted[id(loader)] = adapt_loader(
                loader, seed=self._seed, world_size=self._world_size, rank=self.rank
            )
        return found

    def sample(self) -> Callable[[], Any] | None:
        """Return what gives a batch for a rehearsal, from the first loader that can."""
        found = (getattr(loader, "sample_batch", None) for _, loader in self._loaders.values())
        return next((sample for sample in found if sample is not None), None)
