"""The membership of a job: pure values, no processes.

A rank is in one of three states: consistent (it holds the committed state and can donate it),
newcomer (its worker was given the rank and is not yet consistent), or lost (it has no usable
worker). Announcing a generation turns lost ranks into newcomers; a newcomer that reports
`Formed` becomes consistent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Which worker holds which rank, in one generation.

    Args:
        workers: Worker ids by rank; of a lost rank the id of its last worker.
        generation: Counts up within an incarnation, from 1.
        incarnation: Counts restarts of all ranks.
        newcomers: Ranks whose worker needs state.
        lost: Ranks without a usable worker.
        joined: Ranks whose worker reported that it stands in this generation.
    """

    workers: tuple[int, ...]
    generation: int = 1
    incarnation: int = 0
    newcomers: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    joined: frozenset[int] = frozenset()

    @property
    def version(self) -> tuple[int, int]:
        """Incarnation and generation: only ever counted up."""
        return self.incarnation, self.generation

    @property
    def ranks(self) -> frozenset[int]:
        """All ranks."""
        return frozenset(range(len(self.workers)))

    @property
    def survivors(self) -> frozenset[int]:
        """Ranks that hold the committed state."""
        return self.ranks - self.lost - self.newcomers

    @property
    def is_formed(self) -> bool:
        """Whether every rank stands in this generation."""
        return not self.lost and self.joined == self.ranks

    def rank_of(self, worker: int) -> int | None:
        """Return the rank that `worker` holds; None if it holds none."""
        for rank, holder in enumerate(self.workers):
            if holder == worker and rank not in self.lost:
                return rank
        return None

    def lose(self, ranks: Iterable[int]) -> Membership:
        """Return the membership after the workers of `ranks` have gone."""
        gone = frozenset(ranks)
        return dataclasses.replace(self, lost=self.lost | gone, joined=self.joined - gone)

    def join(self, rank: int, generation: int) -> Membership:
        """Return the membership after `rank` reported that it stands in `generation`.

        A report about an older generation is void.
        """
        if generation != self.generation or rank in self.lost:
            return self
        return dataclasses.replace(
            self, joined=self.joined | {rank}, newcomers=self.newcomers - {rank}
        )

    def succeed(self, replacements: Mapping[int, int]) -> Membership:
        """Return the next generation, with `replacements` (rank to worker) for lost ranks.

        Newcomers that were not yet consistent stay newcomers.
        """
        if frozenset(replacements) != self.lost:
            raise ValueError(f"lost {sorted(self.lost)}, replaced {sorted(replacements)}")
        workers = list(self.workers)
        for rank, worker in replacements.items():
            workers[rank] = worker
        return dataclasses.replace(
            self,
            workers=tuple(workers),
            generation=self.generation + 1,
            newcomers=self.newcomers | self.lost,
            lost=frozenset(),
            joined=frozenset(),
        )

    def take_back(self, rank: int, worker: int) -> Membership:
        """Return the membership in which `worker`, which is consistent, holds `rank` again."""
        workers = (*self.workers[:rank], worker, *self.workers[rank + 1 :])
        return dataclasses.replace(
            self,
            workers=workers,
            newcomers=self.newcomers - {rank},
            lost=self.lost - {rank},
            joined=self.joined - {rank},
        )

    def restart(self, workers: Iterable[int]) -> Membership:
        """Return the first generation of the next incarnation, with new workers everywhere."""
        return Membership(workers=tuple(workers), incarnation=self.incarnation + 1)
