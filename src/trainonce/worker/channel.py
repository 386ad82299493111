"""The log of one channel: the messages from one rank of a group to another."""

from __future__ import annotations

import sys
import zlib
from typing import TYPE_CHECKING, Any

from trainonce.worker.operation import SETUP, STAGES, Known, Op, OpState
from trainonce.worker.oplog import OpLog

if TYPE_CHECKING:
    from trainonce.worker.buffers import BufferPool
    from trainonce.worker.inner import InnerGroup
    from trainonce.worker.oplog import GroupLog

# Tags from here on are for messages of stages that get ready.
_STAGES_TAG = 1 << 30
# Keeps the sum over all channels of a job within 64 bits.
_WEIGHT_BITS = 30


class Channel(OpLog):
    """The messages of one rank of a group to another, as one of the two sees them.

    The two ends number them alike. The sender keeps a copy of each until nobody can ask for it:
    that a message was sent does not say that it arrived. The receiver knows, and keeps nothing.
    So a receiver that is new gets the copies, and a sender that is new is told what need not be
    sent again.

    Args:
        group: Over whose inner group they go.
        source: Rank in the group that sends.
        target: Rank in the group that receives.
        tag: The caller's. Sends and receives of a tag match in their order.
        sends: Whether this rank is the source.
        stages: Names the pipeline whose stages get ready by these messages; else empty.
        taken: Names of messages that a process before this one has sent and the target has
            received; updated by each recovery.
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
        self.tag = _STAGES_TAG + zlib.crc32(stages.encode()) % _STAGES_TAG if stages else tag
        """By which the inner group matches them."""
        self.sends = sends
        self.stages = stages
        self.taken = taken
        self.unsent: list[Op] = []
        self.last_interval = sys.maxsize
        """Once this was committed, nobody uses the channel any more."""
        self._weight = zlib.crc32(self.key.encode()) >> (32 - _WEIGHT_BITS) or 1

    @staticmethod
    def name(group: GroupLog, source: int, target: int, tag: int, stages: str) -> str:
        """Return the key of the channel, the same at both ends."""
        return f"{group.key}:{source}>{target}#{stages or tag}"

    @property
    def inner(self) -> InnerGroup | None:
        """The inner group that carries the messages, if there is one now."""
        return self.group.inner

    @property
    def other_end(self) -> int:
        """Global rank at the other end."""
        return self.ranks[1] if self.sends else self.ranks[0]

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
            if op.name not in self.taken:
                self.unsent.append(op)
        return self.sends

    def to_issue(self) -> list[Op]:
        """Return what is to go out now, in the order in which it does at the other end.

        A message to be sent is returned once.
        """
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
        self.unsent = [op for op in self.unsent if op.name not in self.taken]

    def balance(self, interval: int) -> int:
        """Return what is 0 summed over both ends if all of set-up and `interval` was received.

        A multiple of a number that is the channel's own, so that the sum over several channels
        is 0 for no other reason, but for a chance of 1 in 2**30.
        """
        count = self.num_issued(SETUP) + self.num_issued(interval)
        return count * (self._weight if self.sends else -self._weight)

    def drop_if_too_many(self, interval: int, pool: BufferPool) -> bool:
        """Drop nothing: the sender learns at a commit only which messages have gone out.

        Until then the inner group sends from the copies, or has not begun to. The receiver keeps
        no bytes of them.
        """
        return False

    def known(self, op: Op) -> Known:
        """Return what can be given of a message: all of it by the source."""
        if self.sends:
            return Known.RESULT
        return Known.NOTHING if op.state is OpState.PENDING else self.known_ahead(op.interval)

    def known_ahead(self, interval: int) -> Known:
        """Return what can be given of a message that has arrived."""
        return known_of_arrived(interval, sends=self.sends)


def known_of_arrived(interval: int, *, sends: bool) -> Known:
    """Return what one end of a channel can give of a message that has arrived."""
    return Known.RESULT if sends or interval == STAGES else Known.TAKEN
