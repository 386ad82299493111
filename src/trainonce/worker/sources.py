"""The loaders of a script."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from trainonce.worker.data import StatefulLoader, StatefulPlace, adapt_loader
from trainonce.worker.loader import ShardedLoader

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from trainonce.worker.spare import Promotion

SourceKey: TypeAlias = "int | str"
"""What passes over a loader are counted by, on all ranks and in a successor alike.

Loaders of set-up are numbered in their order. A loop makes others, one an epoch say, and a newcomer
leaves out iterations: they go by the function that makes them.
"""


@dataclass(slots=True)
class _Known:
    """What is known of a loader."""

    loader: Callable[[], Any]
    """Returns it; None where it is gone."""
    key: SourceKey
    kept: ShardedLoader | StatefulPlace | None = None
    """What is kept of a loader that is not ours from one pass to the next."""


class Sources:
    """The loaders, which live as long as the script holds them, or a loop goes through them.

    Args:
        seed: The run's seed.
        world_size: Number of ranks.
        promotion: The rank, now or later.
        is_set_up: Whether the script has come to its first loop or step.
    """

    def __init__(
        self, seed: int, world_size: int, promotion: Promotion, is_set_up: Callable[[], bool]
    ) -> None:
        self._seed = seed
        self._world_size = world_size
        self._promotion = promotion
        self._is_set_up = is_set_up
        self._count = 0
        self._of_set_up: list[weakref.ref[ShardedLoader]] = []
        self._loaders: dict[int, _Known] = {}

    @property
    def rank(self) -> int | None:
        """The rank of this process; None while it has none."""
        return self._promotion.rank if self._promotion.done else None

    def add(self, loader: Any, maker: FrameType) -> SourceKey:
        """Return the key of `loader`, which gets one if it is new.

        Args:
            loader: Any.
            maker: Who makes it, or comes with it first.
        """
        return self._known(loader, maker).key

    def adapt(self, loader: Any, maker: FrameType) -> ShardedLoader | StatefulLoader:
        """Return `loader` as one that can go on at any batch.

        Raises:
            DataError: It cannot say where it stands.
        """
        if isinstance(loader, ShardedLoader):
            return loader
        known = self._known(loader, maker)
        if isinstance(known.kept, ShardedLoader):
            return known.kept
        found = adapt_loader(
            loader,
            seed=self._seed,
            world_size=self._world_size,
            rank=self.rank,
            place=known.kept,
        )
        known.kept = found.place if isinstance(found, StatefulLoader) else found
        return found

    def sample(self) -> Callable[[], Any] | None:
        """Return what gives a batch for a rehearsal, from the first loader that can."""
        found = (each() for each in self._of_set_up)
        return next((loader.sample_batch for loader in found if loader is not None), None)

    def _known(self, loader: Any, maker: FrameType) -> _Known:
        known = self._loaders.get(id(loader))
        if known is None or known.loader() is not loader:
            known = self._loaders[id(loader)] = _Known(self._refer(loader), self._next_key(maker))
            if isinstance(loader, ShardedLoader) and not self._is_set_up():
                self._of_set_up.append(weakref.ref(loader))
        return known

    def _refer(self, loader: Any) -> Callable[[], Any]:
        number = id(loader)
        try:
            return weakref.ref(loader, lambda _: self._loaders.pop(number, None))
        except TypeError:  # one with slots: it is kept
            return lambda: loader

    def _next_key(self, maker: FrameType) -> SourceKey:
        if self._is_set_up():
            return f"{maker.f_globals.get('__name__')}.{maker.f_code.co_qualname}"
        self._count += 1
        return self._count - 1
