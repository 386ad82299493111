"""Metrics that are averaged over the ranks behind the next step's computation."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from trainonce.worker.values import MAX_MEANS, LazyMean


class Means:
    """The means of the last commit, until their reduction is issued.

    Args:
        world_size: Number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._waiting: list[LazyMean] = []
        self._reduced_at = -1

    @property
    def waiting(self) -> list[LazyMean]:
        """Those of the last commit that are not reduced yet."""
        return self._waiting

    def commit(self, means: list[LazyMean]) -> None:
        """Take the means of the step that is being committed."""
        self._waiting = means

    def reduce(self, commits: int) -> None:
        """Issue the reduction of the last commit's means; they are read when asked for."""
        means, self._waiting = self._waiting, []
        if self._world_size == 1:
            for mean in means:
                mean.average = mean.local
        if not means or self._world_size == 1:
            return
        self._reduced_at = commits
        sums = torch.zeros(2 * MAX_MEANS, dtype=torch.float64)
        for index, mean in enumerate(means):
            if mean.local == mean.local:  # a lost value is a NaN, and counts for nothing
                sums[index], sums[MAX_MEANS + index] = mean.local, 1.0
        work = dist.all_reduce(sums, async_op=True)

        def read(index: int) -> float:
            assert work is not None
            work.wait()
            total, count = sums[index].item(), sums[MAX_MEANS + index].item()
            return total / count if count else math.nan

        for index, mean in enumerate(means):
            mean.resolve(lambda index=index: read(index))

    def reduced(self, commits: int) -> bool:
        """Tell whether the ranks reduce means after the commit that made `commits`."""
        return self._reduced_at == commits

    def expect(self, reduced: bool, commits: int) -> None:
        """As a newcomer: take part in the last commit's reduction exactly if the others do.

        What the predecessor published ahead of the commit does not tell, as it may have died
        before it came to the call of `run.mean`.
        """
        if not reduced:
            self._waiting = []
            return
        self._reduced_at = commits
