"""Asynchronous successive halving, ask and tell: promoted trials go on, none begins anew.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020 (ASHA).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.graph.sweeps.sweep import Result
    from trainonce.graph.sweeps.trial import Trial


class Halving:
    """Which trials to train, and how far: `ask` for some, `sweep` them, `tell` the results.

    ::

        search = once.Halving(trials, rungs=(10, 30, 90))
        while batch := search.ask():
            for result in once.sweep(batch).results:
                search.tell(result)
        best = search.best()

    A trial is promoted to the next rung when it is among the best `1 / factor` of those that
    were told at its own, so that nobody waits for a rung to be full (ASHA). A promotion goes on
    from the stored state.

    Args:
        trials: What to choose from.
        rungs: After how many steps trials are judged, growing.
        factor: One of so many is promoted.
        score: Makes a number of a result's value; the value itself by default. Less is better.
        batch: How many trials `ask` returns at most; all that can be trained by default.

    Raises:
        ConfigError: An argument does not fit.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        *,
        rungs: Sequence[int],
        factor: int = 3,
        score: Callable[[Any], float] = float,
        batch: int | None = None,
    ) -> None:
        if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] < 1:
            raise ConfigError(f"rungs={tuple(rungs)} are no growing numbers of steps")
        if factor < 2:
            raise ConfigError(f"factor={factor}: at least 2, or every trial is promoted")
        self._trials = list(trials)
        self._rungs = tuple(rungs)
        self._factor = factor
        self._score = score
        self._batch = batch
        self._asked: dict[int, int] = {}  # trial -> the rung it is being trained to
        self._next = 0
        self._scores: list[dict[int, float]] = [{} for _ in rungs]
        self._promoted: list[set[int]] = [set() for _ in rungs]

    def ask(self) -> list[Trial]:
        """Return trials to train, each up to its rung; none when there is nothing left to do.

        What was asked for and not told yet is not asked for again.
        """
        found: list[Trial] = []
        while self._batch is None or len(found) < self._batch:
            chosen = self._promotable()
            if chosen is None and self._next < len(self._trials):
                chosen = (self._next, 0)
                self._next += 1
            if chosen is None:
                break
            number, rung = chosen
            self._asked[number] = rung
            found.append(self._trials[number].until(self._rungs[rung]))
        return found

    def tell(self, result: Result) -> None:
        """Take the result of a trial that was asked for.

        Raises:
            ConfigError: It was not asked for.
        """
        trial = result.trial
        for number, rung in self._asked.items():
            if (
                self._trials[number].schedules is trial.schedules
                and self._trials[number].segment is trial.segment
                and self._rungs[rung] == trial.num_steps
            ):
                del self._asked[number]
                self._scores[rung][number] = self._score(result.value)
                return
        raise ConfigError(
            f"a trial of {trial.num_steps} steps was told that was not asked for",
            hint="tell each result of `sweep(search.ask())` once",
        )

    def best(self) -> Trial | None:
        """Return the best trial of the highest rung that any reached, or None."""
        for rung in reversed(range(len(self._rungs))):
            if scores := self._scores[rung]:
                return self._trials[_ranked(scores)[0]].until(self._rungs[rung])
        return None

    def _promotable(self) -> tuple[int, int] | None:
        """Return a trial and the rung it may go on to, the highest first."""
        for rung in reversed(range(len(self._rungs) - 1)):
            scores = self._scores[rung]
            for number in _ranked(scores)[: len(scores) // self._factor]:
                if number not in self._promoted[rung]:
                    self._promoted[rung].add(number)
                    return number, rung + 1
        return None


def _ranked(scores: dict[int, float]) -> list[int]:
    # A diverged trial (NaN) comes last.
    return sorted(scores, key=lambda number: (scores[number] != scores[number], scores[number]))
