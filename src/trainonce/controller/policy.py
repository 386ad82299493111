"""What to do about hangs, deaths and spares: pure functions that return decisions.

A decision carries its reason, and the launcher shows that same reason.
"""

from __future__ import annotations

import dataclasses
import enum
import signal
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError
from trainonce.ledger.words import one_line
from trainonce.wire.progress import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence


class Action(enum.Enum):
    """What the launcher does next."""

    WAIT = "wait"
    REPLACE = "replace"
    REFORM = "reform"
    RESTART = "restart"
    END = "end"


@dataclass(frozen=True)
class Decision:
    """An action, the ranks it is about, and why."""

    action: Action
    reason: str
    ranks: tuple[int, ...] = ()


# ------------------------------------------------------------------------------- hangs


@dataclass(frozen=True, kw_only=True)
class HangLimits:
    """How long no progress is not yet a hang.

    Inside a section the limit is `max(floor_s, multiple * median step time)`. Between
    sections the launcher cannot know what the script does, so the floor is higher there.

    Args:
        floor_s: Least limit while some rank is inside a section.
        outside_floor_s: Least limit while no rank is.
        multiple: Of the median step time.
        forming_s: A generation that has not formed for this long has hung newcomers.
        stopped_s: A process that was stopped (SIGSTOP) for this long is a hang.
    """

    floor_s: float = 60.0
    outside_floor_s: float = 600.0
    multiple: float = 10.0
    forming_s: float = 300.0
    stopped_s: float = 1.0

    def __post_init__(self) -> None:
        limits = (self.floor_s, self.outside_floor_s, self.multiple, self.forming_s)
        if not all(limit > 0 for limit in limits):
            raise ConfigError(
                f"a hang limit must be above 0, not {min(limits):g}",
                hint="give --hang-timeout-s more than 0 seconds",
            )


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Where a rank stands, as read from its progress page.

    Args:
        rank: Which one.
        phase: What it is doing.
        commits: Committed steps.
        issued: Collectives issued by its worker.
        pending: Those of them that are not complete.
        silent_s: Since something on its page last changed.
        busy_s: For how much longer it said it would be saving or compiling.
        stopped_s: For how long its process has been stopped; 0 if it runs.
        newcomer: Its worker is not consistent yet, or was promoted in this generation.
        inside: It is inside a section.
    """

    rank: int
    phase: Phase
    commits: int = 0
    issued: int = 0
    pending: int = 0
    silent_s: float = 0.0
    busy_s: float = 0.0
    stopped_s: float = 0.0
    newcomer: bool = False
    inside: bool = False

    @property
    def waits(self) -> bool:
        """Whether it waits for others; DDP's reducer does so inside its backward pass."""
        return self.phase == Phase.WAITING or self.pending > 0


_OUTSIDE = (Phase.STARTING, Phase.SETUP, Phase.BETWEEN)
_ENDED = (Phase.ENDING, Phase.DONE)


def judge_progress(
    ranks: Sequence[RankStatus],
    limits: HangLimits,
    *,
    step_times_s: Sequence[float] = (),
    forming_s: float | None = None,
    reformed: bool = False,
) -> Decision:
    """Decide whether some rank hangs, and which.

    The culprit is a rank that has not entered the collective the others wait in. A rank
    that makes progress, however slow, is left alone; so is a job in which nobody waits for
    anybody, since then no rank is proven to be at fault. Where the script of some ranks has
    ended while the others wait in a later step, they took different ways through it. Where
    they may also wait for what came before, new connections are tried first.

    Args:
        ranks: Every rank that has a worker.
        limits: How long is too long.
        step_times_s: Recent step times.
        forming_s: For how long the current generation has been forming; None once formed.
        reformed: These ranks were connected again in this very step, and it did not help.
    """
    stopped = [r for r in ranks if r.stopped_s > limits.stopped_s]
    if stopped:
        return Decision(
            Action.REPLACE,
            f"stopped for {max(r.stopped_s for r in stopped):.1f} s,"
            f" limit {limits.stopped_s:.1f} s",
            tuple(r.rank for r in stopped),
        )
    if forming_s is not None:
        late = tuple(r.rank for r in ranks if r.newcomer and r.busy_s <= 0)
        if forming_s > limits.forming_s and late:
            return Decision(
                Action.REPLACE,
                f"not consistent after {forming_s:.1f} s, limit {limits.forming_s:.1f} s",
                late,
            )
        return Decision(Action.WAIT, "a generation is forming")
    if not ranks or any(r.busy_s > 0 for r in ranks):
        return Decision(Action.WAIT, "a rank is saving or compiling")
    silent_s = min(r.silent_s for r in ranks)
    waiting = [r for r in ranks if r.waits]
    idle = (*_ENDED, Phase.DRAINED)
    others = [r for r in ranks if not r.waits and r.phase not in idle]
    outside = bool(others) and all(r.phase in _OUTSIDE for r in others)
    limit_s = max(
        limits.outside_floor_s if outside else limits.floor_s,
        limits.multiple * statistics.median(step_times_s) if step_times_s else 0.0,
    )
    if silent_s <= limit_s:
        return Decision(Action.WAIT, f"silent {silent_s:.1f} s, limit {limit_s:.1f} s")
    reason = f"no progress for {silent_s:.1f} s, limit {limit_s:.1f} s"
    if not waiting:
        return Decision(Action.WAIT, f"{reason}, but no rank waits for another")
    if others:
        least = min(r.issued for r in others)
        return Decision(Action.REPLACE, reason, tuple(r.rank for r in others if r.issued == least))
    ended = [r for r in ranks if r.phase in _ENDED]
    left = [r for r in waiting if r not in ended]
    parted = ended and left and min(r.commits for r in left) >= max(r.commits for r in ended)
    if parted and (reformed or all(r.inside for r in left)):
        return Decision(
            Action.END,
            f"rank {left[0].rank} waits in step {left[0].commits} for rank {ended[0].rank}, whose"
            f" script ended after {ended[0].commits} steps: what decides how long a loop runs must"
            " be equal on all ranks (docs/api.md, Variables of the script)",
        )
    return Decision(Action.REFORM, f"{reason}, and all ranks wait in a collective")


# ------------------------------------------------------------------------------- deaths


@dataclass(frozen=True, kw_only=True)
class Death:
    """The end of one ranked worker.

    Args:
        rank: The rank it held.
        step: Steps it had committed; -1 if not every rank had finished its set-up.
        cause: As in `trainonce.events.Incident`.
        detail: As in `trainonce.events.Incident`.
        chaos: A fault plan did it.
        signum: The signal that ended it; 0 for none.
        crowded: It lacked memory while it shared a device: the launcher's doing.
    """

    rank: int
    step: int
    cause: str
    detail: str
    chaos: bool = False
    signum: int = 0
    crowded: bool = False

    @property
    def signature(self) -> tuple[int, str, str]:
        """What deaths of one origin have in common; hangs differ in how long they were watched."""
        return (self.step, self.cause, "" if self.cause == "hang" else self.detail)


# Signals by which a program ends itself when it is broken. The others come from outside, so
# meeting them twice proves nothing about the script.
_OF_THE_PROGRAM = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
)
_LIMIT_OF_THE_PROGRAM = 2
_LIMIT_FROM_OUTSIDE = 5


def is_of_the_script(death: Death) -> bool:
    """Tell whether `death` looks like the script's own doing."""
    if death.chaos or death.crowded:
        return False
    return death.cause in ("exception", "misuse", "exit") or death.signum in _OF_THE_PROGRAM


def judge_death(history: Sequence[Death], world_size: int) -> Decision:
    """Decide whether the last death of `history` is one to recover from.

    The same death of the same rank in the same section, by the worker that replaced the
    first, is a bug and not a failure: the second time if the script did it, the fifth time
    if it came from outside. So is the same exception from all ranks, and at once what we
    refuse.

    Args:
        history: Every death of the job, oldest first.
        world_size: Number of ranks.
    """
    last = history[-1]
    if last.chaos:
        return Decision(Action.REPLACE, "injected by the fault plan", (last.rank,))
    if last.crowded:
        return Decision(Action.REPLACE, "its device does not hold two workers", (last.rank,))
    alike = [d for d in history if not (d.chaos or d.crowded) and d.signature == last.signature]
    times = sum(d.rank == last.rank for d in alike)
    ranks = {d.rank for d in alike}
    what = one_line(last.detail)
    where = f"step {last.step}" if last.step >= 0 else "the set-up"
    if last.cause == "misuse":
        return Decision(Action.END, f"rank {last.rank} ended with {what} in {where}", (last.rank,))
    again = is_of_the_script(last) or last.cause == "recovery"  # which would end the same way
    limit = _LIMIT_OF_THE_PROGRAM if again else _LIMIT_FROM_OUTSIDE
    if times >= limit:
        return Decision(
            Action.END,
            f"rank {last.rank} ended with {what} in {where}, {times} times",
            (last.rank,),
        )
    if last.cause == "exception" and world_size > 1 and len(ranks) == world_size:
        return Decision(
            Action.END, f"every rank ended with {what} in {where}", tuple(sorted(ranks))
        )
    return Decision(Action.REPLACE, f"{what} in {where}, for the first time", (last.rank,))


# ------------------------------------------------------------------------------- spares


@dataclass(frozen=True, kw_only=True)
class SpareStatus:
    """A worker without a rank.

    Args:
        worker: Its id.
        where: Where it is parked; empty while it starts.
        connected: It has said Hello, so it can be promoted.
        stopped: Its process was stopped by a signal.
        fit: Nothing speaks against the device and the host it runs on.
    """

    worker: int
    where: str = ""
    connected: bool = False
    stopped: bool = False
    fit: bool = True


_BEST_PLACES = ("loop", "section")


def rank_spares(spares: Sequence[SpareStatus]) -> list[int]:
    """Return the workers that can be promoted, the best first.

    A spare that waits before its first batch takes over fastest; one that is parked earlier
    in the script, or still on its way, has more to do.
    """
    able = [s for s in spares if s.connected and not s.stopped]
    able.sort(key=lambda s: (not s.fit, s.where not in _BEST_PLACES, not s.where, s.worker))
    return [s.worker for s in able]


# ------------------------------------------------------------------------------- room


class WhenNoSpare(enum.Enum):
    """What becomes of a lost rank for which there is neither a spare nor a free slot.

    `WAIT` for a slot; `SPREAD` the lost ranks over the slots of others, as their guests; or write
    a `CHECKPOINT` and end.
    """

    WAIT = "wait"
    SPREAD = "spread"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class SlotStatus:
    """A place for a worker.

    Args:
        slot: Its number.
        usable: Nothing says that its device is lost.
        workers: How many live there now.
    """

    slot: int
    usable: bool = True
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where to start workers for lost ranks.

    Args:
        slots: One for each worker to start.
        shared: How many of these, the last ones, somebody else is in already.
        short: For how many ranks there is no place.
        leave: Only to finish the step: a checkpoint is to be written, and the job to end.
    """

    slots: tuple[int, ...] = ()
    shared: int = 0
    short: int = 0
    leave: bool = False


def find_room(wanted: int, slots: Sequence[SlotStatus], when_no_spare: WhenNoSpare) -> Room:
    """Decide where to start `wanted` workers.

    Free slots come first. Guests are spread so that no slot holds two while another holds none;
    the slot of a device that is about to fail takes one only where there is no better.
    """
    free = [s.slot for s in slots if s.usable and not s.workers][:wanted]
    missing = max(0, wanted - len(free))
    hosts = {s.slot: s for s in slots if s.workers}
    if not missing:
        return Room(slots=tuple(free))
    if when_no_spare is WhenNoSpare.WAIT or not hosts:
        return Room(slots=tuple(free), short=missing)
    load = {slot: status.workers for slot, status in hosts.items()}
    for _ in range(missing):
        best = min(load, key=lambda slot: (not hosts[slot].usable, load[slot], slot))
        load[best] += 1
        free.append(best)
    return Room(slots=tuple(free), shared=missing, leave=when_no_spare is WhenNoSpare.CHECKPOINT)


def place_ranks(
    num_ranks: int, slots: Sequence[SlotStatus], when_no_spare: WhenNoSpare
) -> tuple[int, ...]:
    """Return a slot for each rank of a start of all ranks; empty where there is no room.

    Rank 3 goes to slot 3, as at the start of the job, unless that is lost or taken.
    """
    taken = {s.slot: s for s in slots}
    placed: dict[int, int] = {}
    for rank in range(num_ranks):
        status = taken[rank]
        if status.usable and not status.workers:
            placed[rank] = rank
            taken[rank] = dataclasses.replace(status, workers=1)
    others = [rank for rank in range(num_ranks) if rank not in placed]
    # All ranks start together: nothing is there to be finished by a guest.
    spread = when_no_spare is WhenNoSpare.SPREAD
    room = find_room(
        len(others), list(taken.values()), when_no_spare if spread else WhenNoSpare.WAIT
    )
    if room.short:
        return ()
    placed |= dict(zip(others, room.slots, strict=True))
    return tuple(placed[rank] for rank in range(num_ranks))


def place_for_move(
    slots: Sequence[SlotStatus], present: int, when_no_spare: WhenNoSpare
) -> int | None:
    """Return where to start a worker that takes over from one in slot `present`; None: nowhere.

    Without a free slot that is the present one, for as long as both are there. If its device is
    to be left, the rank becomes a guest elsewhere, where the user wants that.
    """
    free = [s.slot for s in slots if s.usable and not s.workers]
    if free:
        return free[0]
    if any(s.slot == present and s.usable for s in slots):
        return present
    hosts = [s for s in slots if s.usable]
    if when_no_spare is not WhenNoSpare.SPREAD or not hosts:
        return None
    return min(hosts, key=lambda s: (s.workers, s.slot)).slot


# The words of torch's allocators and of CUDA, which raise several types of exceptions.
_OUT_OF_MEMORY = ("OutOfMemoryError:", "MemoryError:", "out of memory", "can't allocate memory")


def is_out_of_memory(detail: str) -> bool:
    """Tell whether `detail` of a death is an exception for want of memory."""
    return any(words in detail for words in _OUT_OF_MEMORY)
