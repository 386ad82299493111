"""The stage tree of a sweep: stretches of training that trials share, each of them once.

Stage trees are from Shin et al., "Hippo: Taming Hyper-parameter Optimization of Deep Learning
with Stage Trees" (2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from trainonce.graph.sweeps.trial import shared_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trainonce.graph.sweeps.trial import Trial


# Schedules with more changes than this are not cut at each.
_MAX_CHANGES = 8


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `last - 1` of every trial that goes through it.

    Args:
        trial: One of these trials.
        first: Where it begins.
        last: Where it ends.
    """

    trial: Trial
    first: int
    last: int

    @property
    def name(self) -> tuple[int, bytes]:
        """What tells the state at its end from every other."""
        return id(self.trial.segment), self.trial.prefixes[self.last]

    @property
    def parent(self) -> tuple[int, bytes]:
        """The name of the stage before it."""
        return id(self.trial.segment), self.trial.prefixes[self.first]


def boundaries(trials: Sequence[Trial], save_every: int | None = None) -> list[list[int]]:
    """Return for each trial where its stages end, in order; the last is its own end.

    They end where trials part, and where a schedule of few changes takes one.

    Args:
        trials: Of one segment or of several.
        save_every: End a stage at the multiples of this many steps as well.
    """
    cuts = [{trial.num_steps} for trial in trials]
    for number, trial in enumerate(trials):
        runs = trial.runs(0, trial.num_steps)
        if len(runs) <= _MAX_CHANGES:
            # A later trial may take another turn where this one takes one.
            cuts[number].update(accumulate(count for count, _ in runs))
        if save_every:
            cuts[number].update(range(save_every, trial.num_steps, save_every))
        for other in range(number):
            if trials[other].segment is trial.segment:
                shared = shared_steps(trial, trials[other])
                if shared:
                    cuts[number].add(shared)
                    cuts[other].add(shared)
    return [sorted(found) for found in cuts]


def stages(trial: Trial, ends: Iterable[int]) -> list[Stage]:
    """Return the stages of one trial."""
    found: list[Stage] = []
    first = 0
    for last in ends:
        found.append(Stage(trial, first, last))
        first = last
    return found


def distinct_steps(all_stages: Iterable[Stage]) -> int:
    """Return how many steps there are once stages of equal name are one."""
    lengths = {stage.name: stage.last - stage.first for stage in all_stages}
    return sum(lengths.values())
