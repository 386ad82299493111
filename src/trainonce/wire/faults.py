"""Fault plans: which fault hits which rank, at which step and point.

The text form is what `trainonce run --chaos` takes::

    kill rank=1 step=50 point=backward; stop rank=0 step=80; migrate rank=1 step=120;
    lose rank=1 step=200 point=backward; restore step=240; random every=30s seed=7

A fault fires at most once in a job. Kills, stops, exits and exceptions are carried out by
the worker itself at the named point, so that they hit exactly there; for migrations, resets and
restores a worker waits where the step begins until the launcher has carried them out; random
faults come from the launcher at any time. `refuse_impossible` finds what cannot fire in a job;
the rest that did not is told at the end of the job.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Where a worker can be hit. `backward` is while gradients are computed, `collective` right
# after a reduction was issued, `update` inside the optimizer's step.
POINTS = (
    "loader", "begin", "forward", "backward", "collective", "reduced", "update", "updated",
    "commit", "between", "recovery", "promotion", "donate", "end",
)  # fmt: skip

# Not in the course of training: a fault hits the first of them from its step on.
RECOVERY_POINTS = ("recovery", "promotion", "donate")

# Carried out by the worker at a point.
WORKER_FAULTS = ("kill", "lose", "stop", "raise", "exit", "flip", "slow")
# Carried out by the launcher, while the rank that they are about (or else rank 0) waits for it.
AWAITED_FAULTS = ("migrate", "reset", "restore")
# Carried out by the launcher once the job has reached the step, and there is the occasion.
LAUNCHER_FAULTS = ("kill_spare", "kill_launcher")
ACTIONS = (*WORKER_FAULTS, *AWAITED_FAULTS, *LAUNCHER_FAULTS, "random")
_NEED_RANK = (*WORKER_FAULTS, "migrate")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Args:
        index: Its place in the plan; identifies it within a job.
        action: One of `ACTIONS`.
        rank: The rank to hit; -1 where it does not matter.
        step: Fires when this many steps are committed, so 0 is the first step; at one of
            `RECOVERY_POINTS`, and of `LAUNCHER_FAULTS`, also when more are.
        point: One of `POINTS`; of `WORKER_FAULTS` only.
        after: Skip this many passes of the point within the step (the third collective:
            after=2).
        every_s: For "random": mean seconds between faults.
        seed: For "random": seed of its own generator.
        seconds: For "slow": how long. For "lose": after so long the device is back; 0: only
            with "restore".
    """

    index: int
    action: str
    rank: int = -1
    step: int = 0
    point: str = "begin"
    after: int = 0
    every_s: float = 0.0
    seed: int = 0
    seconds: float = 0.0

    @property
    def meets(self) -> int:
        """The rank that comes to it; -1 where no rank does."""
        if self.action in AWAITED_FAULTS:
            return max(self.rank, 0)
        return self.rank if self.action in WORKER_FAULTS else -1

    def to_record(self) -> dict[str, Any]:
        """Return the fault as plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the fault as an entry of a plan."""
        words = [self.action]
        if self.action in _NEED_RANK:
            words.append(f"rank={self.rank}")
        if self.step or self.action != "random":
            words.append(f"step={self.step}")
        if self.action in WORKER_FAULTS:
            words.append(f"point={self.point}")
        words += [f"after={self.after}"] if self.after else []
        words += [f"every={self.every_s:g}s"] if self.every_s else []
        words += [f"seed={self.seed}"] if self.seed else []
        words += [f"for={self.seconds:g}s"] if self.seconds else []
        return " ".join(words)


_KEYS = {"rank": int, "step": int, "point": str, "after": int, "seed": int}
_SECONDS = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m)?$")
_SCALE = {"ms": 1e-3, "s": 1.0, None: 1.0, "m": 60.0}


def _seconds(text: str, entry: str) -> float:
    match = _SECONDS.match(text)
    if not match:
        raise ConfigError(f"{text!r} is no duration, in {entry!r}", hint="write 30s, 500ms or 2m")
    return float(match[1]) * _SCALE[match[2]]


def parse_plan(text: str) -> list[Fault]:
    """Return the faults that `text` describes, in its order.

    Raises:
        ConfigError: An entry is not understood; names the entry and what is allowed.
    """
    plan: list[Fault] = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        action, *pairs = entry.split()
        if action not in ACTIONS:
            raise ConfigError(
                f"unknown fault {action!r} in {entry!r}", hint="one of " + ", ".join(ACTIONS)
            )
        values: dict[str, Any] = {}
        keys = [pair.partition("=")[0] for pair in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"{twice[0]!r} twice in {entry!r}", hint="write a fault for each")
        for pair in pairs:
            key, equals, value = pair.partition("=")
            try:
                if key == "every":
                    values["every_s"] = _seconds(value, entry)
                elif key == "for":
                    values["seconds"] = _seconds(value, entry)
                else:
                    values[key] = _KEYS[key](value)
            except ConfigError:
                raise
            except KeyError:
                raise ConfigError(
                    f"unknown field {key!r} in {entry!r}",
                    hint="one of " + ", ".join((*_KEYS, "every", "for")),
                ) from None
            except ValueError:
                raise ConfigError(
                    f"{key}={value} is no number, in {entry!r}", hint="write rank=0 step=50"
                ) from None
            if not equals:
                raise ConfigError(
                    f"{pair!r} wants a value, in {entry!r}", hint="write rank=0 step=50"
                )
        fault = Fault(index=len(plan), action=action, **values)
        if fault.point not in POINTS:
            raise ConfigError(
                f"unknown point {fault.point!r} in {entry!r}", hint="one of " + ", ".join(POINTS)
            )
        if min(fault.step, fault.after) < 0:
            raise ConfigError(f"never, in {entry!r}", hint="step and after are 0 or more")
        if fault.action in _NEED_RANK and fault.rank < 0:
            raise ConfigError(f"which rank? in {entry!r}", hint="add rank=0")
        if fault.action == "random" and fault.every_s <= 0:
            raise ConfigError(f"how often? in {entry!r}", hint="add every=30s")
        if fault.action == "slow" and fault.seconds <= 0:
            raise ConfigError(f"for how long? in {entry!r}", hint="add for=2s")
        plan.append(fault)
    return plan


def refuse_impossible(plan: Sequence[Fault], *, num_ranks: int, spares: int) -> None:
    """Refuse a plan with a fault that cannot fire in a job of so many ranks and spares.

    Raises:
        ConfigError: Names the first such fault.
    """
    for fault in plan:
        if fault.rank >= num_ranks:
            raise ConfigError(
                f"--chaos hits rank {fault.rank} ({fault}), and the job has ranks 0 to"
                f" {num_ranks - 1}",
                hint="name one of these, or raise --nproc-per-node",
            )
        if num_ranks == 1 and (fault.action == "migrate" or fault.point == "donate"):
            raise ConfigError(
                f"--chaos wants another rank to give its state ({fault}), and the job has one",
                hint="raise --nproc-per-node",
            )
        if fault.point == "commit" and fault.step == 0 and fault.action != "random":
            raise ConfigError(
                f"--chaos hits a commit before the first ({fault})",
                hint="at a commit, step counts those made: the first is step=1",
            )
        if fault.action == "kill_spare" and not spares:
            raise ConfigError(
                f"--chaos kills a spare ({fault}), and the job keeps none", hint="add --spares 1"
            )
        if fault.action == "restore" and all(other.action != "lose" for other in plan):
            raise ConfigError(
                f"--chaos gives back a device ({fault}), and loses none",
                hint='add "lose rank=0 step=5" before it',
            )
