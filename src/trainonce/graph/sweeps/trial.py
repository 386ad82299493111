"""Trials: hyperparameters as schedules over steps, and the digests of their prefixes.

Two trials share a prefix where every hyperparameter has the same value at every step of it; how
the schedules are written does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from blake3 import blake3

from trainonce.errors import ConfigError
from trainonce.graph.digest import digest

if TYPE_CHECKING:
    from trainonce.graph.sweeps.segment import Segment

Schedule: TypeAlias = "Any | Callable[[int], Any] | Mapping[int, Any] | Sequence[Any]"
# Consecutive steps with equal values: how many, and the values.
Runs: TypeAlias = "list[tuple[int, dict[str, Any]]]"


@dataclass(frozen=True, eq=False)
class Trial:
    """One training run of a sweep; made by `Segment.trial`.

    Args:
        segment: What is trained.
        num_steps: For how long.
        schedules: Hyperparameter -> schedule: a value; a function of the step; a mapping from
            the first step at which a value holds; or a list with one value a step.
    """

    segment: Segment
    num_steps: int
    schedules: Mapping[str, Schedule]

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"a trial of {self.num_steps} steps trains nothing")

    def until(self, num_steps: int) -> Trial:
        """Return the same trial with another end; whatever is shared is trained once."""
        return Trial(self.segment, num_steps, self.schedules)

    def values(self, step: int) -> dict[str, Any]:
        """Return the hyperparameters at a step, counted from 0."""
        return {
            name: _at(name, schedule, step) for name, schedule in sorted(self.schedules.items())
        }

    def runs(self, first: int, last: int) -> Runs:
        """Return the hyperparameters of steps `first` to `last - 1`, equal ones together."""
        found: Runs = []
        names = self._digests
        for step in range(first, last):
            if found and names[step] == names[step - 1]:
                found[-1] = (found[-1][0] + 1, found[-1][1])
            else:
                found.append((1, self.values(step)))
        return found

    @cached_property
    def prefixes(self) -> list[bytes]:
        """A digest for each prefix: `prefixes[n]` names the values of the first n steps."""
        names = [b"\0" * 32]
        for name in self._digests:
            names.append(blake3(names[-1] + name).digest())
        return names

    @cached_property
    def _digests(self) -> list[bytes]:
        """A digest of the values at each step."""
        known: dict[Any, bytes] = {}
        found: list[bytes] = []
        for step in range(self.num_steps):
            values = self.values(step)
            token = tuple((name, type(value), value) for name, value in values.items())
            try:
                name = known.get(token)
            except TypeError:  # a list, say: it has a digest all the same
                name, token = None, None
            if name is None:
                name = bytes.fromhex(digest(values, path="hyperparameters"))
                if token is not None:
                    known[token] = name
            found.append(name)
        return found


def shared_steps(one: Trial, other: Trial) -> int:
    """Return for how many steps two trials of one segment have equal hyperparameters."""
    low, high = 0, min(one.num_steps, other.num_steps)
    while low < high:
        middle = (low + high + 1) // 2
        if one.prefixes[middle] == other.prefixes[middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _at(name: str, schedule: Schedule, step: int) -> Any:
    if callable(schedule):
        return schedule(step)
    if isinstance(schedule, Mapping):
        begun = [first for first in schedule if first <= step]
        if not begun:
            raise ConfigError(
                f"{name} has no value at step {step}: its schedule begins at {min(schedule)}",
                hint="a mapping goes from the first step at which a value holds; begin at 0",
            )
        return schedule[max(begun)]
    if isinstance(schedule, list):
        if step >= len(schedule):
            raise ConfigError(f"{name} has {len(schedule)} values, and none for step {step}")
        return schedule[step]
    return schedule
