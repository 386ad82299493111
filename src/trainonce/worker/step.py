"""The exactly-once step: what happens around one call of a function marked `@run.step`."""

from __future__ import annotations

import enum
import functools
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from trainonce.worker.foreseen import Foreseen
from trainonce.worker.seeds import derive_seed, seed_generators

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from trainonce.worker.cursor import Position
    from trainonce.worker.foreseen import Sight
    from trainonce.worker.runner import Runner
    from trainonce.worker.values import LazyMean
    from trainonce.worker.variables import Taken

P = ParamSpec("P")
R = TypeVar("R")


class UpdateKind(enum.IntEnum):
    """How a step changes protected state; known after its first execution, and only grows."""

    PLAIN = 0
    """An optimizer changes it, and no collective follows."""
    LATE = 1
    """Collectives follow the first change: a copy from before it is kept until the commit."""
    OPAQUE = 2
    """Changed by other means than an optimizer: the copy is taken when the step begins."""
    UNKNOWN = 3
    """Not executed yet: treated as opaque once."""


# Executions whose number of collectives tells what to expect of the next. DDP's buckets change
# after the first two.
_REMEMBERED = 4


@dataclass
class StepProfile:
    """What is known of a step function from its executions."""

    kind: UpdateKind = UpdateKind.UNKNOWN
    operations: deque[int] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """Collectives that the last executions issued."""
    returns: Any = None
    """Outline of what it returned last."""
    foreseen: Foreseen = field(default_factory=Foreseen)
    changes_late: bool = False
    """Whether some rank's local state still changes after the last collective, on any rank."""
    looks_again: bool = False
    """Whether variables change in it ahead of that, on any rank."""

    def may_be_last(self, issued: int) -> bool:
        """Tell whether a collective may be the last one, after `issued` others of its step.

        Where it is none of them, ranks wait for each other before the update.
        """
        return issued + 1 >= min(self.operations, default=0)


class StepProfiles:
    """What is known of every step function, equal on all ranks that stand at one commit."""

    def __init__(self) -> None:
        self._known: dict[str, StepProfile] = {}
        self._counts: dict[str, int] = {}

    def register(self, function: Callable[..., Any], *, in_set_up: bool) -> StepProfile:
        """Return the profile of a step function that the script makes.

        Those of set-up count by name. What a loop makes, in each epoch say, shares a profile: a
        newcomer leaves out iterations, and would count fewer of them.
        """
        name = function.__qualname__
        if not in_set_up:
            line = getattr(getattr(function, "__code__", None), "co_firstlineno", 0)
            return self._known.setdefault(f"{name}:{line}", StepProfile())
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return self._known.setdefault(f"{name}/{count}", StepProfile())

    def to_record(self) -> list[list[Any]]:
        """Return what a newcomer must know, as plain values."""
        return [
            [
                key, int(p.kind), list(p.operations), p.changes_late, p.looks_again,
                p.foreseen.to_record(),
            ]
            for key, p in self._known.items()
        ]  # fmt: skip

    def load(self, record: list[list[Any]]) -> None:
        """Take over what another rank knows."""
        for key, kind, operations, late, again, foreseen in record:
            profile = self._known.setdefault(key, StepProfile())
            profile.kind, profile.changes_late = UpdateKind(kind), late
            profile.looks_again = again
            profile.operations = deque(operations, maxlen=_REMEMBERED)
            profile.foreseen.load(foreseen)


@dataclass
class Execution:
    """One execution of a step that is under way."""

    position: Position
    profile: StepProfile
    begun_mono_ns: int
    caller: FrameType
    """Where the step was called."""
    thread: int
    commits: int
    """Committed steps before it."""
    operations_before: int = 0
    """Collectives that this interval had issued when the execution began."""
    waited_before_ns: int = 0
    """What this process had waited in collectives before."""
    busy_ns: int = 0
    """Until the last collective was issued, less what was waited for others."""
    published: bool = False
    """Local state for its commit is in the mirror."""
    variables: Taken | None = None
    """Of the script, when it began."""
    changed_ahead: bool = False
    """Whether they were others when local state was published ahead of the commit."""
    snapshot: bytes | None = None
    """Of the local state that is in the mirror, in the first execution."""
    stepped: bool = False
    """An optimizer has taken its step."""
    agreed: bool = False
    """All ranks have met in this step, and told each other what they know of it."""
    meets_again: bool = False
    """They will do so once more before the commit."""
    kind: UpdateKind = UpdateKind.PLAIN
    """What this execution has shown."""
    means: list[LazyMean] = field(default_factory=lambda: [])
    sources: list[Any] = field(default_factory=lambda: [])
    """What each of `means` is the mean of."""
    seen: Sight = field(default_factory=lambda: {})
    """What its variables held when local state was published last."""
    returns: Any = None
    """Outline of what it returns, as it was published."""
    ended: bool = False
    """The function has returned `value`."""
    value: Any = None

    def shares(self) -> list[tuple[LazyMean, Any]]:
        """Return its means, with what each is the mean of."""
        return list(zip(self.means, self.sources, strict=True))


class Step(Generic[P, R]):
    """A function whose calls are exactly once.

    Args:
        runner: Executes it.
        function: The user's function.
    """

    def __init__(self, runner: Runner, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.profile = runner.profiles.register(function, in_set_up=not runner.entered)
        self._runner = runner

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Execute the step, or return its recorded value if it is already committed."""
        runner = self._runner
        runner.check_heeded()
        if runner.rehearsing or runner.executing:
            return self.function(*args, **kwargs)
        runner.enter()
        position = runner.cursor.enter_section()
        caller = sys._getframe(1)
        if runner.cursor.is_committed(position):
            return runner.replay.value(position, caller)
        execution = Execution(
            position, self.profile, time.monotonic_ns(), caller, threading.get_ident(),
            runner.commits,
        )  # fmt: skip
        runner.inside = True
        try:
            runner.begin(execution)
            try:
                return runner.complete(execution, self.function(*args, **kwargs))
            except BaseException as error:
                runner.failure = error
                raise
        finally:
            runner.inside = False


def seed_section(seed: int, rank: int, commits: int, calls: int) -> None:
    """Set the generators for a section: the `calls`-th since `commits` committed steps."""
    seed_generators(derive_seed("step", seed, rank, commits, calls))


def seed_between(seed: int, rank: int, commits: int) -> None:
    """Set the generators for the code after a commit."""
    seed_generators(derive_seed("between", seed, rank, commits))
