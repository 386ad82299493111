"""The fabric: what carries the collectives of training threads out, whatever fails meanwhile.

Training threads submit operations and wait on their futures; they never see a failure. The
fabric logs an operation in the journal (`journal.py`), which keeps what a newcomer may ask for,
and the dispatcher (`dispatch.py`) issues it on the inner group of the present generation. When
the controller announces the next one, a recovery (`recovery.py`) makes all ranks consistent, and
the dispatcher goes on with what nobody completed.

One lock, the journal's, guards all three. Nobody waits for another rank, or for the update gate,
who holds it; a recovery and a commit take the gate first.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from trainonce.errors import CollectiveError
from trainonce.wire.messages import Note
from trainonce.worker.dispatch import Dispatcher
from trainonce.worker.journal import Journal
from trainonce.worker.operation import SETUP
from trainonce.worker.recovery import Recovery

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trainonce.wire.messages import Generation, Message
    from trainonce.wire.progress import Progress
    from trainonce.worker.channel import Channel
    from trainonce.worker.host import Host
    from trainonce.worker.journal import Log
    from trainonce.worker.operation import Op, Outcome
    from trainonce.worker.oplog import GroupLog
    from trainonce.worker.plan import RankReport


class Fabric:
    """All process groups of this worker.

    Args:
        world_size: Number of ranks of the job.
        progress: Page on which to count operations.
        notify: Sends a message to the controller.
    """

    def __init__(
        self, world_size: int, progress: Progress, notify: Callable[[Message], object]
    ) -> None:
        self.notify = notify
        self.host: Host | None = None
        """Set before anything is submitted or announced."""
        self.journal = Journal(world_size)
        self.dispatcher = Dispatcher(self.journal, progress, notify)
        self.recovery: Recovery | None = None
        """That of the newest generation that was announced, under way or over."""
        self.rank = -1

        # What is being issued, as training threads say.
        self.early = False
        """It is complete on all ranks before any rank can commit."""
        self.settling = False
        """It says that this rank needs nothing more of the interval before."""
        self.stages = ""
        """Pipeline and turn of the stages that are getting ready on this rank; else empty."""
        self.stages_late = False
        """The other ranks have done so before: collectives on the way are answered locally."""

        # What the ranks have agreed on.
        self.subgroups_elsewhere = False
        """Another rank has a group that does not span the world: torch tells members only."""
        self.messages = False
        """There are messages between single ranks."""
        self.order_ranks: tuple[int, ...] = tuple(range(world_size))
        """All ranks; the first of a group's is whose bucket order holds, where none is settled."""

        # Where this process stands among the ranks.
        self.original = True
        """It has been there from the beginning."""
        self.consistent = False
        """It holds the state. A newcomer that got it may still be announced as one, if somebody
        else died before the controller heard of it."""
        self.replayable = threading.Event()
        """Cleared in a newcomer until it has the results that the survivors logged."""
        self.replayable.set()

    # ------------------------------------------------------------------ groups and channels

    @property
    def world(self) -> GroupLog:
        """The log of the group of all ranks."""
        return self.journal.world

    def add_group(self, key: str, ranks: list[int]) -> GroupLog:
        """Register a process group beside the world."""
        with self.journal.lock:
            group = self.journal.add_group(key, ranks)
            if self.dispatcher.connected:
                self.dispatcher.form(group)
        return group

    @property
    def has_subgroups(self) -> bool:
        """Whether there are groups that do not span the world, on this rank or another."""
        return self.subgroups_elsewhere or any(
            not group.spans_world for group in self.journal.groups.values()
        )

    def order_root(self, group: GroupLog) -> int:
        """Return whose bucket order holds, where none was settled yet: a rank within `group`."""
        return group.ranks.index(next(r for r in self.order_ranks if r in group.ranks))

    def channel(self, group: GroupLog, source: int, target: int, tag: int) -> Channel:
        """Return the channel from one rank of `group` to another, of which this rank is one."""
        stages = self.stages if self.journal.interval != SETUP else ""
        sends = group.ranks[source] == self.rank
        with self.journal.lock:
            return self.journal.channel(group, source, target, tag, sends=sends, stages=stages)

    def begin_stages(self, name: str, turn: int, *, late: bool) -> None:
        """Take note that the stages of the pipeline `name` get ready on this rank.

        Args:
            name: The same on all its ranks.
            turn: How often they did so before, and this time.
            late: The others have done so before.
        """
        with self.journal.lock:
            self.stages, self.stages_late = f"{name}/{turn}", late
            self.journal.retire_stages(name, self.stages)

    def end_stages(self) -> None:
        """Take note that they are ready."""
        self.stages, self.stages_late = "", False

    # ------------------------------------------------------------------ training threads

    def submit(self, log: Log, op: Op) -> None:
        """Issue `op`, or complete it from the log if its result is known.

        A message is complete for its sender once it is logged.
        """
        host, journal = self.host, self.journal
        assert host is not None
        recalled = host.recall()
        if recalled is not None:
            _deliver_recalled(op, recalled)
            return
        interval = host.before_submit(log, op)
        self.replayable.wait()
        with journal.lock:
            op.settles, op.early = self.settling, self.early
            known = journal.add(log, op, interval)
            if not host.in_step and journal.bound(log, op):
                self._tell_of_dropped()
            self.dispatcher.dispatch(log, op)
        if known:
            self.dispatcher.finish(log, op)
        host.after_submit()

    def _tell_of_dropped(self) -> None:
        self.notify(
            Note(
                key="outside",
                level="warning",
                text="so many collectives outside of steps that their results are no longer kept:"
                " were a rank lost before the next commit, all would resume from the last"
                " checkpoint. In functions under @run.step they are kept a step at a time",
            )
        )

    def wait(self, log: Log, op: Op) -> None:
        """Wait until `op` has its result."""
        self.dispatcher.wait(log, op)

    def drain_pending(self) -> None:
        """Wait for every operation issued so far."""
        self.dispatcher.drain()

    # ------------------------------------------------------------------ steps

    def start_at(self, commits: int) -> None:
        """Leave set-up: operations from now on belong to step `commits`."""
        self.journal.start_at(commits)

    def commit(self) -> None:
        """Close the interval. The caller holds the update gate."""
        self.journal.commit()

    def num_issued(self) -> int:
        """Return how many world operations this interval has issued, for the script and DDP."""
        return self.journal.num_issued

    def spanned(self) -> bool:
        """Tell whether an operation over all ranks was issued in this interval."""
        return self.journal.spanned()

    @property
    def has_channels(self) -> bool:
        """Whether this rank has sent to or received from single ranks."""
        return bool(self.journal.channels)

    def balance(self) -> int:
        """Return a number whose sum over all ranks is 0 if all that was sent was received."""
        return self.journal.balance()

    def describe_messages(self) -> str:
        """Return in words what this rank has sent and received in this interval."""
        return self.journal.describe_messages()

    def log_bytes(self) -> tuple[int, int]:
        """Return the bytes the log holds now, and the most it ever held."""
        return self.journal.pool.held_bytes, self.journal.pool.peak_bytes

    # ------------------------------------------------------------------ generations

    def announce(self, generation: Generation) -> None:
        """Begin a generation; abandons the one before at once, wherever it stands.

        Called by the thread that listens to the controller.
        """
        assert self.host is not None
        with self.journal.lock:
            before = self.recovery
            if before is not None and generation.generation <= before.generation.generation:
                return
            self.rank = generation.rank
            if self.is_newcomer(generation):
                self.original = False
                self.replayable.clear()
            abandoned, works = self.dispatcher.disconnect()
            if before is not None and before.inner not in abandoned:
                abandoned.append(before.inner)
            self.recovery = recovery = Recovery(self, self.host, generation)
        for inner in abandoned:
            inner.abort(works)
        recovery.start()

    def is_newcomer(self, generation: Generation) -> bool:
        """Tell whether this process needs the state in `generation`."""
        return generation.rank in generation.newcomers and not self.consistent

    def learn(self, reports: Iterable[RankReport]) -> None:
        """Take note of what other ranks know of groups and messages."""
        world = len(self.world.ranks)
        for report in reports:
            self.subgroups_elsewhere |= any(len(each) < world for each in report.groups.values())
            self.messages |= report.messages
            self.journal.members |= report.groups
            self.journal.ends |= report.channels


def _deliver_recalled(op: Op, recalled: Outcome) -> None:
    """Complete an operation that the other ranks have long behind them."""
    signature, result = recalled
    if signature != op.signature:
        raise CollectiveError(
            f"a collective between steps is {op.signature} here, and was {signature} in the"
            " process that held this rank before",
            hint="code between steps must issue the same collectives when it runs again",
        )
    op.deliver(result)
    op.future.set_result(op.value)
