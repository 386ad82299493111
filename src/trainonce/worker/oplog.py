"""The log of collectives and messages: what was issued, what it gave, and what can be given again.

Operations are named by (group, interval, sequence number). Ranks issue the same sequence in
each interval, so a name means the same operation on all of them, whatever the order in which
they complete. So it is with messages from one rank to another: the two ends of a channel
number them alike.
"""

from __future__ import annotations

import enum
import itertools
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.worker.inner import InnerGroup

# Operations before the first step. Their results stay for the life of the job, since every
# newcomer runs the set-up code of the script again.
SETUP = -1
# Operations of set-up that a newcomer answers by itself, such as those of DDP's constructor.
# A death during set-up restarts it, so nobody ever asks for their results.
UNSHARED = -2
# What operations outside of steps may keep in one interval: a loop of them, an evaluation say,
# would otherwise take memory without end. Set-up may hold large tensors for the life of the job.
MOST_OUTSIDE = 1 << 16
MOST_OUTSIDE_BYTES = 1 << 30
# What the stages of a pipeline tell each other before their first pass. Kept until they get ready
# anew: a newcomer asks for it in whatever step is its first.
STAGES = -3

# What an operation gave: its signature, and the tensors.
Outcome = tuple[str, list[torch.Tensor]]

# Kinds of messages.
SEND, RECEIVE = "send", "recv"


def bucket_order_interval(ordinal: int) -> int:
    """Return the interval in which the `ordinal`-th DDP of the script orders its buckets.

    One of its own, kept for the life of the job: a newcomer asks for the result at another
    place in its script than the survivors did.
    """
    return -10 - ordinal


class Known(enum.IntEnum):
    """What a rank can give of an operation."""

    NOTHING = 0
    """It has no result."""
    RESULT = 1
    """The result."""
    INPUT = 2
    """Its part of the input: where all members issue the operation again, all have the result."""
    TAKEN = 3
    """Nothing more: a message that it has received, and handed on to the script."""


class OpState(enum.Enum):
    """How far an operation has come."""

    PENDING = enum.auto()
    DELIVERING = enum.auto()
    DONE = enum.auto()


@dataclass(eq=False, slots=True)
class Op:
    """One collective of this rank.

    Args:
        kind: Its name, such as "all_reduce".
        signature: Kind, shapes, dtypes and parameters; equal on all ranks.
        launch: Issues it on an inner group, into fresh buffers; returns the work and the
            buffers that will hold the result.
        deliver: Copies a result to where the caller wants it.
        value: What the caller's future resolves to.
    """

    kind: str
    signature: str
    launch: Callable[[InnerGroup], tuple[Any, list[torch.Tensor]]]
    deliver: Callable[[list[torch.Tensor]], None]
    value: list[Any]
    future: torch.futures.Future[Any]
    interval: int = 0
    seq: int = 0
    turn: int = 0
    """When its group issued it, counted over all intervals."""
    state: OpState = OpState.PENDING
    attempt: int = 0
    early: bool = False
    """Every rank has its result before any rank can commit."""
    kept: list[torch.Tensor] = field(default_factory=lambda: [])
    """A copy of the input, kept in place of a result that is larger."""
    settles: bool = False
    """Who has issued it needs nothing more of the interval before, its shadow included."""
    buffers: list[torch.Tensor] = field(default_factory=lambda: [])
    work: Any = None
    """Of a message: what the inner group is doing for it."""
    awaited: bool = False
    """Of a message: a thread waits for `work`."""

    def let_go(self) -> None:
        """Drop what the caller gave: it can be far larger than what is logged."""
        self.deliver = _deliver_nothing
        self.value = []
        self.future = _OVER
        # What is sent comes from the log, and may have to go out yet.
        if not self.kept and self.kind != SEND:
            self.launch = _launch_nothing


_OVER: torch.futures.Future[Any] = torch.futures.Future()
_OVER.set_result(None)


def _deliver_nothing(result: list[torch.Tensor]) -> None:
    raise AssertionError("delivered twice")


def _launch_nothing(inner: InnerGroup) -> tuple[Any, list[torch.Tensor]]:
    raise AssertionError("a complete operation was issued again")


class BufferPool:
    """Reuses the memory of logged results, so that logging does not fault pages in.

    Not thread-safe; the fabric's lock guards it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self.held_bytes = 0
        self.peak_bytes = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Return a contiguous CPU tensor of the shape and dtype of `like`, values undefined."""
        key = (like.dtype, like.numel())
        free = self._free.get(key)
        if free:
            return free.pop().view(like.shape)
        self.held_bytes += like.numel() * like.element_size()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return torch.empty(like.numel(), dtype=like.dtype).view(like.shape)

    def give(self, tensors: list[torch.Tensor]) -> None:
        """Take back tensors that nobody reads or writes any more."""
        for tensor in tensors:
            self._free.setdefault((tensor.dtype, tensor.numel()), []).append(tensor.view(-1))

    def forget(self, tensors: list[torch.Tensor]) -> None:
        """Drop tensors that an abandoned operation may still write to."""
        self.held_bytes -= sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class OpLog:
    """Operations that some ranks take part in, each naming them alike.

    Args:
        key: Names the log on all of them.
        ranks: Their global ranks.
    """

    spans_world = False
    """Whether every rank of the job takes part."""

    def __init__(self, key: str, ranks: list[int]) -> None:
        self.key = key
        self.ranks = ranks
        self.ops: dict[int, dict[int, Op]] = {}
        self._issued: dict[int, int] = {}
        self._replay: dict[tuple[int, int], Outcome] = {}
        self._turns = 0

    def add(self, op: Op, interval: int) -> bool:
        """Give `op` its place in `interval`; if its result is known, attach it.

        Returns:
            Whether the result was known, so that the operation need not be issued.

        Raises:
            CollectiveError: Another operation has that place on the other ranks.
        """
        ops = self.ops.setdefault(interval, {})
        op.interval, op.seq, op.turn = interval, self.num_issued(interval), self._turns
        self._issued[interval] = op.seq + 1
        self._turns += 1
        ops[op.seq] = op
        known = self._replay.pop((interval, op.seq), None)
        if known is None:
            return False
        signature, op.buffers = known
        if signature != op.signature:
            raise CollectiveError(
                f"operation {op.seq} of this step is {op.signature} here, and was {signature}"
                " on the ranks that survived",
                hint="a step must issue the same collectives on every rank, whoever executes it",
            )
        op.state = OpState.DELIVERING
        return True

    def num_issued(self, interval: int) -> int:
        """Return how many operations `interval` has issued, kept or not."""
        return self._issued.get(interval, 0)

    def keep(self, interval: int, seq: int, signature: str, result: list[torch.Tensor]) -> None:
        """Remember a result for an operation that this rank has not issued yet."""
        self._replay[interval, seq] = (signature, result)

    def has_replay(self, interval: int) -> bool:
        """Tell whether results wait for operations of `interval`."""
        return any(name[0] == interval for name in self._replay)

    def lasting(self) -> set[int]:
        """Return the intervals that are kept for the life of the job, asked for here or not."""
        found = {*self.ops, *(interval for interval, _ in self._replay)}
        return {interval for interval in found if interval <= SETUP}

    def pending(self) -> list[Op]:
        """Return the operations without a result."""
        return [
            op for ops in self.ops.values() for op in ops.values() if op.state is OpState.PENDING
        ]

    def unfinished(self) -> list[Op]:
        """Return the operations whose result has not reached the caller."""
        return [
            op for ops in self.ops.values() for op in ops.values() if op.state is not OpState.DONE
        ]

    def release_before(self, interval: int, pool: BufferPool) -> None:
        """Free the results of committed intervals that no rank can ask for any more."""
        for old in [key for key in self.ops if SETUP < key < interval]:
            del self._issued[old]
            for op in self.ops.pop(old).values():
                _give_back(op, pool)
        for name in [name for name in self._replay if SETUP < name[0] < interval]:
            del self._replay[name]

    def release_early(self, interval: int, pool: BufferPool) -> None:
        """Free what no rank can ask for once one has committed `interval`."""
        ops = self.ops.get(interval, {})
        for seq in [seq for seq, op in ops.items() if op.early]:
            _give_back(ops.pop(seq), pool)

    def drop_if_too_many(self, interval: int, pool: BufferPool) -> bool:
        """Free the older half of `interval` where it is more than may be kept outside of steps."""
        ops = self.ops[interval]
        if len(ops) <= MOST_OUTSIDE and (
            interval <= SETUP
            or sum(each.nbytes for op in ops.values() for each in op.buffers) <= MOST_OUTSIDE_BYTES
        ):
            return False
        for seq in list(itertools.islice(ops, len(ops) // 2)):
            if ops[seq].state is OpState.DONE:
                _give_back(ops.pop(seq), pool)
        return True

    def describe(self, intervals: set[int]) -> list[tuple[int, int, str, int]]:
        """Return (interval, sequence number, signature, what can be given) of its operations."""
        return [
            (interval, seq, op.signature, int(self.known(op)))
            for interval, ops in self.ops.items()
            if interval in intervals
            for seq, op in ops.items()
        ] + [
            (interval, seq, signature, int(self.known_ahead(interval)))
            for (interval, seq), (signature, _) in self._replay.items()
            if interval in intervals
        ]

    def known(self, op: Op) -> Known:
        """Return what can be given of `op`."""
        if op.state is OpState.PENDING:
            return Known.NOTHING
        return Known.INPUT if op.kept else Known.RESULT

    def known_ahead(self, interval: int) -> Known:
        """Return what can be given of a result that waits for its operation."""
        return Known.RESULT

    def result(self, interval: int, seq: int) -> list[torch.Tensor]:
        """Return the logged result of an operation that has one."""
        op = self.ops.get(interval, {}).get(seq)
        return op.buffers if op is not None else self._replay[interval, seq][1]


class GroupLog(OpLog):
    """The collectives of one process group.

    Args:
        key: Names the group on all its members.
        ranks: Global ranks of the members, in group order.
        spans_world: Whether every rank of the job is a member.
    """

    def __init__(self, key: str, ranks: list[int], *, spans_world: bool) -> None:
        super().__init__(key, ranks)
        self.spans_world = spans_world
        self.inner: InnerGroup | None = None
        # Operations with a result, to be issued again for those who have none.
        self.again: set[tuple[int, int]] = set()

    def to_issue(self) -> list[Op]:
        """Return what goes out on a new inner group, in the order in which the script issued it.

        That is the order on a newcomer too, whose script comes to these operations one by one.
        By interval it would not be: those in which DDP orders its buckets come first there.
        """
        found = [
            op
            for interval, ops in self.ops.items()
            for seq, op in ops.items()
            if op.state is OpState.PENDING or (interval, seq) in self.again
        ]
        return sorted(found, key=lambda op: op.turn)


class Channel(OpLog):
    """The messages of one rank of a group to another, as one of the two sees them.

    The sender keeps a copy of each until nobody can ask for it: that a message was sent does
    not say that it arrived. The receiver knows, and keeps nothing. So a receiver that is new
    gets the copies, and a sender that is new is told what need not be sent again.

    Args:
        group: Over whose inner group they go.
        source: Rank in the group that sends.
        target: Rank in the group that receives.
        tag: The inner group matches sends and receives of a tag in their order.
        sends: Whether this rank is the source.
        stages: Name of the pipeline whose stages get ready by these messages; else empty.
        taken: (interval, sequence number) of messages of this rank that a process before this
            one has sent and the target has received; updated by each recovery.
    """

    def __init__(
        self,
        group: GroupLog,
        source: int,
        target: int,
        tag: int,
        *,
        sends: bool,
        stages: str = "",
        taken: set[tuple[int, int]],
    ) -> None:
        ranks = [group.ranks[source], group.ranks[target]]
        super().__init__(self.name(group, source, target, tag, stages), ranks)
        self.group = group
        self.tag = tag
        self.sends = sends
        self.stages = stages
        self.taken = taken
        self.unsent: list[Op] = []
        self.last_interval = sys.maxsize
        """Once this was committed, nobody uses the channel any more."""

    @staticmethod
    def name(group: GroupLog, source: int, target: int, tag: int, stages: str) -> str:
        """Return the key of the channel, the same at both ends."""
        return f"{group.key}:{source}>{target}#{stages or tag}"

    @property
    def inner(self) -> InnerGroup | None:
        """The inner group that carries the messages, if there is one now."""
        return self.group.inner

    def signature(self, num_bytes: int) -> str:
        """Return what both ends must agree on: the size of a message, not its shape.

        What stages say in words may differ in size from one process to another.
        """
        return "message of stages" if self.stages else f"message({num_bytes} bytes)"

    def add(self, op: Op, interval: int) -> bool:
        """Give a message its place; return whether it is complete for this rank."""
        if super().add(op, interval):
            return True
        if self.sends:
            # It has all it needs, and waits for nobody.
            op.state = OpState.DELIVERING
            if (op.interval, op.seq) not in self.taken:
                self.unsent.append(op)
        return self.sends

    def to_issue(self) -> list[Op]:
        """Return what goes out on a new inner group, in the order in which the other end does."""
        if not self.sends:
            return [op for op in self.pending() if op.work is None]
        unsent, self.unsent = self.unsent, []
        return unsent

    def abandon(self) -> list[Any]:
        """Forget what the inner group was doing; return that, to be let go of."""
        ops = [op for ops in self.ops.values() for op in ops.values() if op.work is not None]
        works = [op.work for op in ops]
        for op in ops:
            op.work = None
        return works

    def hand_over(self) -> None:
        """Take note that copies of all messages so far are about to be handed over."""
        self.unsent.clear()

    def drop_taken(self) -> None:
        """Take note that what the target has received is not to be sent."""
        self.unsent = [op for op in self.unsent if (op.interval, op.seq) not in self.taken]

    def balance(self, interval: int) -> int:
        """Return how many messages of `interval` this rank has issued, negative if it receives."""
        count = len(self.ops.get(interval, ()))
        return count if self.sends else -count

    def known(self, op: Op) -> Known:
        """Return what can be given of a message: all of it by the source."""
        if self.sends:
            return Known.RESULT
        return Known.NOTHING if op.state is OpState.PENDING else self.known_ahead(op.interval)

    def known_ahead(self, interval: int) -> Known:
        """Return what can be given of a message that has arrived."""
        return self.ahead(interval, sends=self.sends)

    @staticmethod
    def ahead(interval: int, *, sends: bool) -> Known:
        """Return what an end can give of a message that it knows of."""
        return Known.RESULT if sends or interval == STAGES else Known.TAKEN


def _give_back(op: Op, pool: BufferPool) -> None:
    pool.give(op.buffers)
    pool.give(op.kept)
    op.buffers, op.kept, op.work = [], [], None
