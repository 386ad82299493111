"""One operation: a collective, or a message from one rank to another, as this rank sees it.

Operations are named by (log, interval, sequence number). Ranks issue the same sequence in
each interval, so a name means the same operation on all of them, whatever the order in which
they complete.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.worker.inner import InnerGroup

# ---------------------------------------------------------------------- intervals
# An interval from 0 on is what lies between two commits: that which follows commit k is k.
# Those below are kept for the life of the job.

# Operations before the first step: every newcomer runs the set-up code of the script again.
SETUP = -1
# Operations of set-up that a newcomer answers by itself, such as those of DDP's constructor.
# A death during set-up restarts it, so nobody ever asks for their results.
UNSHARED = -2
# What the stages of a pipeline tell each other before their first pass. Kept until they get ready
# anew: a newcomer asks for it in whatever step is its first.
STAGES = -3


def bucket_order_interval(ordinal: int) -> int:
    """Return the interval in which the `ordinal`-th DDP of the script orders its buckets.

    One of its own, kept for the life of the job: a newcomer asks for the result at another
    place in its script than the survivors did.
    """
    return -10 - ordinal


# What an operation gave: its signature, and the tensors.
Outcome = tuple[str, list[torch.Tensor]]

# Kinds of messages.
SEND, RECEIVE = "send", "recv"


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
    """It has no result; what the inner group does for it may fail."""
    DELIVERING = enum.auto()
    """It has its result, whatever becomes of the inner group; one thread is handing it over."""
    DONE = enum.auto()
    """The caller has the result."""


@dataclass(eq=False, slots=True)
class Op:
    """One operation of this rank. The journal's lock guards what changes.

    Args:
        kind: Its name, such as "all_reduce".
        signature: Kind, shapes, dtypes and parameters; equal on all ranks.
        launch: Issues it on an inner group, into fresh buffers; returns the work and the
            buffers that will hold the result.
        deliver: Copies a result to where the caller wants it.
        value: What the caller's future resolves to.
        future: The caller's.
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
    """When its log took it, counted over all intervals."""
    state: OpState = OpState.PENDING
    attempt: int = 0
    """Of the times that it was issued or given up, which this is: late results are told by it."""
    early: bool = False
    """Every rank has its result before any rank can commit."""
    kept: list[torch.Tensor] = field(default_factory=lambda: [])
    """A copy of the input, kept in place of a result that is larger."""
    settles: bool = False
    """Who has issued it needs nothing more of the interval before, its shadow included."""
    buffers: list[torch.Tensor] = field(default_factory=lambda: [])
    """What holds the result, or will."""
    work: Any = None
    """Of a message: what the inner group is doing for it."""
    awaited: bool = False
    """Of a message: a thread waits for `work`."""

    @property
    def name(self) -> tuple[int, int]:
        """Interval and sequence number: its name within its log."""
        return self.interval, self.seq

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
