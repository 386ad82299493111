"""The log of one process group: what was issued, what it gave, and what can be given again."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from trainonce.errors import CollectiveError
from trainonce.worker.operation import SETUP, Known, Op, OpState, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.worker.buffers import BufferPool
    from trainonce.worker.inner import InnerGroup

# What operations outside of steps may keep in one interval: a loop of them, an evaluation say,
# would otherwise take memory without end. Set-up may hold large tensors for the life of the job.
MOST_OUTSIDE = 1 << 16
MOST_OUTSIDE_BYTES = 1 << 30


class Unclaimed(dict[tuple[int, int], Outcome]):
    """Results for operations that this rank has not issued yet, by interval and number."""

    def intervals(self) -> set[int]:
        """Return the intervals that they belong to."""
        return {interval for interval, _ in self}

    def describe(
        self, intervals: set[int], known: Callable[[int], Known]
    ) -> list[tuple[int, int, str, int]]:
        """Return (interval, sequence number, signature, what can be given) of each.

        Args:
            intervals: Those that are asked for.
            known: Returns what can be given of the results of an interval.
        """
        return [
            (interval, seq, signature, int(known(interval)))
            for (interval, seq), (signature, _) in self.items()
            if interval in intervals
        ]

    def release_before(self, interval: int, pool: BufferPool) -> None:
        """Free those of committed intervals."""
        for name in [name for name in self if SETUP < name[0] < interval]:
            pool.give(self.pop(name)[1])


class OpLog:
    """Operations that some ranks take part in, each naming them alike.

    Not thread-safe; the journal's lock guards it.

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
        self.open: dict[Op, None] = {}
        """Operations whose result has not reached the caller, in the order of issue."""
        self.unclaimed = Unclaimed()
        self._issued: dict[int, int] = {}
        self._turns = 0

    def add(self, op: Op, interval: int) -> bool:
        """Give `op` its place in `interval`; if its result is known, attach it.

        Returns:
            Whether the result was known, so that the operation need not be issued.

        Raises:
            CollectiveError: Another operation has that place on the other ranks.
        """
        op.interval, op.seq, op.turn = interval, self.num_issued(interval), self._turns
        self._issued[interval] = op.seq + 1
        self._turns += 1
        self.ops.setdefault(interval, {})[op.seq] = op
        self.open[op] = None
        known = self.unclaimed.pop((interval, op.seq), None) if self.unclaimed else None
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

    def close(self, op: Op) -> None:
        """Take note that the caller of `op` has its result."""
        op.state = OpState.DONE
        del self.open[op]

    def num_issued(self, interval: int) -> int:
        """Return how many operations `interval` has issued, kept or not."""
        return self._issued.get(interval, 0)

    def find(self, interval: int, seq: int) -> Op | None:
        """Return an operation by its name; None if it was not issued yet, or is not kept."""
        return self.ops.get(interval, {}).get(seq)

    def lasting(self) -> set[int]:
        """Return the intervals that are kept for the life of the job, asked for here or not."""
        return {
            interval for interval in (*self.ops, *self.unclaimed.intervals()) if interval <= SETUP
        }

    def pending(self) -> list[Op]:
        """Return the operations without a result."""
        return [op for op in self.open if op.state is OpState.PENDING]

    def release_before(self, interval: int, pool: BufferPool) -> None:
        """Free the results of committed intervals that no rank can ask for any more."""
        for old in [key for key in self.ops if SETUP < key < interval]:
            del self._issued[old]
            for op in self.ops.pop(old).values():
                _give_back(op, pool)
        self.unclaimed.release_before(interval, pool)

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
        ] + self.unclaimed.describe(intervals, self.known_ahead)

    def known(self, op: Op) -> Known:
        """Return what can be given of `op`."""
        if op.state is OpState.PENDING:
            return Known.NOTHING
        return Known.INPUT if op.kept else Known.RESULT

    def known_ahead(self, interval: int) -> Known:
        """Return what can be given of a result that waits for its operation."""
        return Known.RESULT


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
        """What carries its operations out; None while a generation forms."""
        self.again: set[tuple[int, int]] = set()
        """Names of operations with a result, to be issued again for those who have none."""

    def to_issue(self) -> list[Op]:
        """Return what goes out on a new inner group, in the order in which the script issued it.

        That is the order on a newcomer too, whose script comes to these operations one by one.
        By interval it would not be: those in which DDP orders its buckets come first there.
        """
        found = self.pending()
        for name in self.again:
            op = self.find(*name)
            if op is not None and op.state is not OpState.PENDING:
                found.append(op)
        return sorted(found, key=lambda op: op.turn)


def _give_back(op: Op, pool: BufferPool) -> None:
    pool.give(op.buffers)
    pool.give(op.kept)
    op.buffers, op.kept, op.work = [], [], None
