"""Ranks that are slower than the others, from the time each takes before its collectives.

The length of a whole step cannot tell: all ranks wait for the slowest, so all steps are equally
long. What a rank does before it enters the first collective is its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Ranks of a healthy job are alike to this share of a step at best; less is no scatter to trust.
_SIGMA_FLOOR = 2e-3


@dataclass(frozen=True, kw_only=True)
class StragglerSettings:
    """When a rank is a straggler.

    Args:
        window: Steps over which a rank's median is taken: hiccups vanish in it.
        every: Steps between two looks.
        sigmas: How many robust standard deviations above the ranks' median.
        min_slower: And by which share at least.
        in_a_row: In so many looks one after the other.
    """

    window: int = 20
    every: int = 5
    sigmas: float = 6.0
    min_slower: float = 0.02
    in_a_row: int = 3

    def __post_init__(self) -> None:
        if self.window < 3 or self.every < 1 or self.in_a_row < 1:
            raise ConfigError(f"a window of 3 steps and looks of 1 are the least: {self}")
        if not (self.sigmas > 0 and self.min_slower > 0):
            raise ConfigError(f"sigmas and min_slower must be more than 0: {self}")


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A slow rank.

    Args:
        rank: Which one.
        slower: By which share it takes longer than the median rank.
        sigmas: How many robust standard deviations that is.
        step: At which step it was found.
        reason: The same in words.
    """

    rank: int
    slower: float
    sigmas: float
    step: int
    reason: str


class StragglerDetector:
    """Finds slow ranks. Needs three ranks at least: of two, neither is the odd one.

    Args:
        num_ranks: Ranks of the job.
        settings: When a rank is a straggler.
    """

    def __init__(self, num_ranks: int, settings: StragglerSettings | None = None) -> None:
        if num_ranks < 1:
            raise ConfigError(f"a job has at least one rank, not {num_ranks}")
        self.settings = settings or StragglerSettings()
        self._steps: deque[np.ndarray] = deque(maxlen=self.settings.window)
        self._num_ranks = num_ranks
        self._in_a_row = np.zeros(num_ranks, dtype=np.int64)
        self._seen = 0

    def observe(self, step: int, busy_s: Sequence[float]) -> list[Straggler]:
        """Take one step in; return the stragglers, if it is time for a look.

        Args:
            step: The step's number, for the report.
            busy_s: For each rank, seconds before its first collective; NaN where not known.

        Raises:
            ConfigError: There are more or fewer ranks than given.
        """
        row = np.asarray(busy_s, dtype=np.float64)
        if row.shape != (self._num_ranks,):
            raise ConfigError(f"{row.size} times for {self._num_ranks} ranks")
        self._steps.append(np.where(np.isfinite(row) & (row > 0), row, np.nan))
        self._seen += 1
        full = len(self._steps) == self.settings.window
        if not full or (self._seen - self.settings.window) % self.settings.every:
            return []
        return self._look(step)

    def forget(self, rank: int) -> None:
        """Start anew with a rank that another worker holds now."""
        for row in self._steps:
            row[rank] = np.nan
        self._in_a_row[rank] = 0

    def _look(self, step: int) -> list[Straggler]:
        settings = self.settings
        window = np.stack(self._steps)
        known = np.isfinite(window).sum(axis=0) * 2 >= settings.window
        if known.sum() < 3:
            self._in_a_row[:] = 0
            return []
        usual = np.full(self._num_ranks, np.nan)
        usual[known] = np.nanmedian(window[:, known], axis=0)
        middle = float(np.nanmedian(usual))
        sigma = 1.4826 * float(np.nanmedian(np.abs(usual - middle)))
        sigmas = (usual - middle) / max(sigma, _SIGMA_FLOOR * middle)
        slower = usual / middle - 1
        # NaN compares as False: an unknown rank is no straggler.
        slow = (sigmas > settings.sigmas) & (slower > settings.min_slower)
        self._in_a_row = np.where(slow, self._in_a_row + 1, 0)
        return [
            Straggler(
                rank=int(rank),
                slower=float(slower[rank]),
                sigmas=float(sigmas[rank]),
                step=step,
                reason=(
                    f"rank {rank} takes {slower[rank]:.1%} longer than the median rank before its "
                    f"collectives ({sigmas[rank]:.0f} robust standard deviations, limit "
                    f"{settings.sigmas:g}), {self._in_a_row[rank]} looks in a row"
                ),
            )
            for rank in np.flatnonzero(self._in_a_row >= settings.in_a_row)
        ]
