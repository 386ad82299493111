"""The fabric: issues collectives, logs their results, and re-forms when the membership changes.

Training threads submit operations and wait on their futures; they never see a failure. When
the controller announces a generation, a recovery thread forms the new inner group, agrees
with the others on what everyone has, hands over state and results, and issues again what
nobody completed.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from typing import TYPE_CHECKING, Any, Protocol

from trainonce.errors import CollectiveError, TrainOnceError
from trainonce.wire.messages import Formed, Note, PeerLost
from trainonce.worker.inner import InnerGroup
from trainonce.worker.oplog import (
    SETUP,
    STAGES,
    UNSHARED,
    BufferPool,
    Channel,
    GroupLog,
    Op,
    OpLog,
    OpState,
    Outcome,
)
from trainonce.worker.plan import (
    Donation,
    OpName,
    Plan,
    RankReport,
    ResultTransfer,
    plan_recovery,
)
from trainonce.worker.transfer import receive_tensors, send_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch

    from trainonce.wire.messages import Generation, Message
    from trainonce.wire.progress import Progress


WORLD = "world"
_POLL_S = 0.002
# How often an interval is measured that has operations outside of steps.
_LOOK_EVERY = 1 << 8
# Tags from here on are for messages of stages that get ready.
_STAGES_TAG = 1 << 30
# Keeps the sum over all channels of a job within 64 bits.
_WEIGHT_BITS = 30


class Superseded(Exception):
    """A newer generation was announced; this recovery is void."""


class Host(Protocol):
    """What the fabric asks of the session."""

    @property
    def in_step(self) -> bool:
        """Whether a step is under way."""
        ...

    def recall(self) -> Outcome | None:
        """Return signature and result of an operation that the others have long behind them."""
        ...

    def before_submit(self, log: GroupLog | Channel, op: Op) -> int | None:
        """Called on the issuing thread before each operation.

        Returns:
            An interval of its own to number the operation in, or None for the present one.
        """
        ...

    def after_submit(self) -> None:
        """Called on the issuing thread after each operation was issued."""
        ...

    def wait_restorable(self, superseded: Callable[[], bool]) -> None:
        """Newcomer: wait until the script has registered what must be restored."""
        ...

    def frozen(self, superseded: Callable[[], bool]) -> AbstractContextManager[None]:
        """Hold updates and commits back, once none is under way."""
        ...

    def can_donate(self) -> bool:
        """Tell whether the state as of the last commit can be given now."""
        ...

    def donate(self, inner: InnerGroup, donation: Donation) -> tuple[str, int]:
        """Give this rank's stripe of the state; the first returns the digest of all stripes."""
        ...

    def receive(self, inner: InnerGroup, donation: Donation, plan: Plan) -> tuple[str, int]:
        """Take the state; return its digest and the bytes received."""
        ...

    def restore(self, plan: Plan) -> tuple[str, int]:
        """Take the state from the shadow that the rank left; return its digest and bytes."""
        ...

    def shadow_commits(self) -> list[int]:
        """For which numbers of committed steps the rank left a whole shadow of its state."""
        ...

    @property
    def shards(self) -> list[str]:
        """Shard key of each rank; empty where nothing is split, or not known yet."""
        ...

    def formed(self, message: Generation) -> None:
        """Called when this rank is consistent in the generation of `message`."""
        ...

    def fault_point(self, point: str) -> None:
        """Let the fault plan act."""
        ...


class Fabric:
    """All process groups of this worker, their log, and their recovery.

    Args:
        progress: Page on which to count operations; None outside the launcher.
        notify: Sends a message to the controller.
    """

    def __init__(
        self, world_size: int, progress: Progress, notify: Callable[[Message], object]
    ) -> None:
        self.lock = threading.RLock()
        self.pool = BufferPool()
        self.interval = SETUP
        self.commits = 0
        self.generation = 0
        self.rank = -1
        self.host: Host | None = None
        self.world = GroupLog(WORLD, list(range(world_size)), spans_world=True)
        self._groups: dict[str, GroupLog] = {WORLD: self.world}
        self._channels: dict[str, Channel] = {}
        # Messages that their targets have, by channel: also of channels not made yet.
        self._taken: dict[str, set[tuple[int, int]]] = {}
        # A message was issued or has arrived.
        self._moved = threading.Condition(self.lock)
        # Results by (interval, sequence number) for groups and channels not made here yet.
        self._early: dict[str, dict[tuple[int, int], Outcome]] = {}
        # Members of groups and ends of channels, of this process or another.
        self._members: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        self._progress = progress
        self._notify = notify
        self._announced: Generation | None = None
        self._broken = True
        # Cleared in a newcomer until it has the results that the survivors logged.
        self._replayable = threading.Event()
        self._replayable.set()
        self._reported_lost = 0
        self._forming: InnerGroup | None = None
        self._original = True
        # Whether this process holds the state: a newcomer that got it may still be announced
        # as one, if somebody else died before the controller heard of it.
        self._consistent = False
        self._order_ranks: tuple[int, ...] = tuple(range(world_size))
        self._since = 0
        # World operations of this interval, less those of the runtime itself.
        self._num_issued = 0
        # torch makes a group on its members only; the others are told.
        self.subgroups_elsewhere = False
        # Where state is rebuilt from shadows, a step's results stay until all have one past it:
        # set around the operation that says so.
        self.keeps_step = False
        # Set while what is issued is complete on all ranks before any rank can commit.
        self.early = False
        self.settling = False
        # Intervals of which results were dropped, since there were too many outside of steps.
        self._dropped: set[int] = set()
        # All ranks know that there are messages between single ranks.
        self.messages = False
        self.stages = ""
        """Name of the pipeline whose stages are getting ready on this rank; else empty."""
        self.stages_late = False
        """The other ranks have done so before: collectives on the way are answered locally."""

    # ------------------------------------------------------------------ training threads

    def add_group(self, key: str, ranks: list[int]) -> GroupLog:
        """Register a process group beside the world."""
        spans_world = len(ranks) == len(self.world.ranks)
        group = GroupLog(key, ranks, spans_world=spans_world)
        with self.lock:
            self._groups[key] = group
            self._keep_early(group)
            if not self._broken and self._announced is not None:
                self._form_beside(group, self._announced)
        return group

    def _keep_early(self, log: OpLog) -> None:
        for (interval, seq), (signature, tensors) in self._early.pop(log.key, {}).items():
            log.keep(interval, seq, signature, tensors)

    def channel(self, group: GroupLog, source: int, target: int, tag: int) -> Channel:
        """Return the channel from one rank of `group` to another, of which this rank is one."""
        stages = self.stages if self.interval != SETUP else ""
        key = Channel.name(group, source, target, tag, stages)
        with self.lock:
            found = self._channels.get(key)
            if found is None:
                found = self._channels[key] = Channel(
                    group,
                    source,
                    target,
                    _STAGES_TAG + zlib.crc32(stages.encode()) % _STAGES_TAG if stages else tag,
                    sends=group.ranks[source] == self.rank,
                    stages=stages,
                    taken=self._taken.setdefault(key, set()),
                )
                self._keep_early(found)
        return found

    @property
    def has_channels(self) -> bool:
        """Whether this rank has sent to or received from single ranks."""
        return bool(self._channels)

    def balance(self) -> int:
        """Return a number whose sum over all ranks is 0 if all that was sent was received.

        Messages of this interval and of set-up count. The sum of others is 0 by a chance of 1
        in 2**30.
        """
        with self.lock:
            return sum(
                (channel.balance(SETUP) + channel.balance(self.interval))
                * (zlib.crc32(channel.key.encode()) >> (32 - _WEIGHT_BITS) or 1)
                for channel in self._channels.values()
                if not channel.stages
            )

    def describe_messages(self) -> str:
        """Return in words what this rank has sent and received in this interval."""
        with self.lock:
            found = [
                f"{len(channel.ops.get(self.interval, ()))} {word} rank {channel.ranks[place]}"
                for word, place, sends in (("to", 1, True), ("from", 0, False))
                for channel in self._channels.values()
                if channel.sends is sends and channel.ops.get(self.interval)
            ]
        return ", ".join(found) or "none"

    def begin_stages(self, name: str, turn: int, *, late: bool) -> None:
        """Take note that the stages of the pipeline `name` get ready on this rank.

        Args:
            name: The same on all its ranks.
            turn: How often they did so before, and this time.
            late: The others have done so before.
        """
        with self.lock:
            self.stages, self.stages_late = f"{name}/{turn}", late
            for channel in self._channels.values():
                if channel.stages.startswith(f"{name}/") and channel.stages != self.stages:
                    channel.last_interval = min(channel.last_interval, self.interval)

    def end_stages(self) -> None:
        """Take note that they are ready."""
        self.stages, self.stages_late = "", False

    def order_root(self, group: GroupLog) -> int:
        """Return whose bucket order holds, where none was settled yet: a rank within `group`."""
        return group.ranks.index(next(r for r in self._order_ranks if r in group.ranks))

    def _logs(self) -> list[GroupLog | Channel]:
        return [*self._groups.values(), *self._channels.values()]

    @property
    def has_subgroups(self) -> bool:
        """Whether there are groups that do not span the world, on this rank or another."""
        return self.subgroups_elsewhere or any(
            not group.spans_world for group in self._groups.values()
        )

    def submit(self, log: GroupLog | Channel, op: Op) -> None:
        """Issue `op`, or complete it from the log if its result is known.

        A message is complete for its sender once it is logged.
        """
        assert self.host is not None
        recalled = self.host.recall()
        if recalled is not None:
            signature, result = recalled
            if signature != op.signature:
                raise CollectiveError(
                    f"a collective between steps is {op.signature} here, and was {signature} in the"
                    " process that held this rank before",
                    hint="code between steps must issue the same collectives when it runs again",
                )
            op.deliver(result)
            op.future.set_result(op.value)
            return
        interval = self.host.before_submit(log, op)
        self._replayable.wait()
        with self.lock:
            op.settles, op.early = self.settling, self.early
            given = op.buffers
            known = log.add(op, self.interval if interval is None else interval)
            if op.buffers is not given:
                self.pool.give(given)
            self._progress["issued"] += 1
            if not self.host.in_step and op.seq % _LOOK_EVERY == _LOOK_EVERY - 1:
                self._bound(log, op.interval)
            if log is self.world and op.interval == self.interval and not op.settles:
                self._num_issued += 1
            if isinstance(log, Channel):
                self._issue_messages(log)
            elif not known and not self._broken and log.inner is not None:
                self._issue(log, op)
        if known:
            self._finish(log, op)
        self.host.after_submit()

    def _bound(self, log: GroupLog | Channel, interval: int) -> None:
        """Keep what operations outside of steps leave behind within bounds. The lock is held."""
        if not log.drop_if_too_many(interval, self.pool):
            return
        self._dropped = {old for old in self._dropped if old <= SETUP or old >= self.commits - 1}
        self._dropped.add(interval)
        self._notify(
            Note(
                key="outside",
                level="warning",
                text="so many collectives outside of steps that their results are no longer kept:"
                " were a rank lost before the next commit, all would resume from the last"
                " checkpoint. In functions under @run.step they are kept a step at a time",
            )
        )

    def knows(self, interval: int) -> bool:
        """Tell whether results for `interval` are here, waiting to be asked for."""
        with self.lock:
            return any(group.has_replay(interval) for group in self._groups.values())

    def drain_pending(self) -> None:
        """Wait for every operation issued so far."""
        with self.lock:
            waiting = [(log, op) for log in self._logs() for op in log.unfinished()]
        for log, op in waiting:
            self.wait(log, op)

    def wait(self, log: GroupLog | Channel, op: Op) -> None:
        """Wait until `op` has its result."""
        # gloo tells nobody that a message has come: who needs it waits for it.
        while isinstance(log, Channel) and self._await_message(log, op):
            pass
        op.future.wait()

    def _await_message(self, channel: Channel, op: Op) -> bool:
        """Wait for a message on this thread; return whether it is still to come."""
        with self.lock:
            self._moved.wait_for(lambda: op.work is not None or op.state is not OpState.PENDING)
            if op.state is not OpState.PENDING or op.awaited:
                return False
            work, attempt, op.awaited = op.work, op.attempt, True
        error = ""
        try:
            work.wait()
        except RuntimeError as failure:
            error = str(failure)
        with self.lock:
            op.awaited = False
            if op.attempt != attempt or op.state is not OpState.PENDING:
                return True
            if error:
                op.work = None
                self._inner_failed(error)
                return True
            op.state = OpState.DELIVERING
        self._finish(channel, op)
        return False

    def spanned(self) -> bool:
        """Tell whether an operation over all ranks was issued in this interval."""
        with self.lock:
            return any(
                group.spans_world and group.ops.get(self.interval)
                for group in self._groups.values()
            )

    def num_issued(self) -> int:
        """Return how many world operations this interval has issued, for the script and DDP."""
        return self._num_issued

    def commit(self) -> None:
        """Close the interval. The caller holds the update gate."""
        with self.lock:
            if not self.keeps_step:
                for log in self._logs():
                    log.release_early(self.interval, self.pool)
            self.commits += 1
            self.interval = self.commits
            self._num_issued = 0

    def start_at(self, commits: int) -> None:
        """Leave set-up: operations from now on belong to step `commits`."""
        with self.lock:
            self.commits = self.interval = self._since = commits
            self._num_issued = 0

    def log_bytes(self) -> tuple[int, int]:
        """Return the bytes the log holds now, and the most it ever held."""
        with self.lock:
            return self.pool.held_bytes, self.pool.peak_bytes

    # ------------------------------------------------------------------ completion

    def _issue(self, log: GroupLog | Channel, op: Op) -> None:
        """Hand `op` to the inner group. The lock is held."""
        assert log.inner is not None
        op.attempt += 1
        attempt = op.attempt
        try:
            work, op.buffers = op.launch(log.inner)
        except RuntimeError as error:
            self._inner_failed(str(error))
            return
        if isinstance(log, Channel):
            # Of what is sent too: gloo does not send for a work that is gone.
            op.work = work
            self._moved.notify_all()
            return
        future = work.get_future()
        future.add_done_callback(lambda done: self._inner_done(log, op, attempt, done))

    def _issue_messages(self, channel: Channel) -> None:
        """Hand what the other end lacks, or may send, to the inner group. The lock is held."""
        if not self._broken and channel.inner is not None:
            for op in channel.to_issue():
                self._issue(channel, op)

    def _issue_all(self, group: GroupLog) -> None:
        """Issue what was not completed, and what others lack. The lock is held."""
        for op in group.to_issue():
            if op.state is OpState.PENDING:
                self._issue(group, op)
            else:
                self._serve_again(group, op)
        for channel in self._channels.values():
            if channel.group is group:
                self._issue_messages(channel)

    def _serve_again(self, group: GroupLog, op: Op) -> None:
        """Issue an operation that is complete here, for those who lack it. The lock is held."""
        try:
            work, buffers = op.launch(group.inner)  # type: ignore[arg-type]
        except RuntimeError as error:
            self._inner_failed(str(error))
            return
        generation = self.generation

        def served(done: Any) -> None:
            with self.lock:
                try:
                    done.value()
                except RuntimeError as error:
                    self.pool.forget(buffers)
                    if generation == self.generation:
                        self._inner_failed(str(error))
                else:
                    self.pool.give(buffers)

        work.get_future().add_done_callback(served)

    def _inner_done(self, group: GroupLog, op: Op, attempt: int, done: Any) -> None:
        try:
            done.value()
        except RuntimeError as error:
            with self.lock:
                if op.attempt == attempt and op.state is OpState.PENDING:
                    self._inner_failed(str(error))
            return
        with self.lock:
            if op.attempt != attempt or op.state is not OpState.PENDING:
                return
            op.state = OpState.DELIVERING
        self._finish(group, op)

    def _finish(self, log: GroupLog | Channel, op: Op) -> None:
        op.deliver(op.buffers)
        arrived = isinstance(log, Channel) and not log.sends and op.interval != STAGES
        with self.lock:
            op.state = OpState.DONE
            self._progress["completed"] += 1
            if op.interval == UNSHARED or op.kept or arrived:
                self.pool.give(op.buffers)
                op.buffers = []
            # Every rank has issued this one, hence committed what came before it.
            passed = op.settles or not self.keeps_step
            if log.spans_world and op.interval == self.interval and passed:
                self._release_before(op.interval)
            self._moved.notify_all()
        op.future.set_result(op.value)
        op.let_go()

    def _release_before(self, interval: int) -> None:
        """Free what no rank can ask for any more: all have committed `interval` - 1."""
        for each in self._logs():
            each.release_before(interval, self.pool)
        for key in [key for key, each in self._channels.items() if each.last_interval < interval]:
            del self._channels[key], self._taken[key]
        for results in self._early.values():
            for name in [name for name in results if SETUP < name[0] < interval]:
                del results[name]

    def _inner_failed(self, error: str) -> None:
        """Tell the controller, once a generation. The lock is held."""
        if self._broken or self._reported_lost == self.generation:
            return
        self._reported_lost = self.generation
        self._notify(PeerLost(generation=self.generation, error=error[:500]))

    # ------------------------------------------------------------------ recovery

    def announce(self, message: Generation) -> None:
        """Begin a generation; abandons the one before at once, wherever it stands."""
        with self.lock:
            if self._announced is not None and message.generation <= self._announced.generation:
                return
            self._announced = message
            self.rank = message.rank
            self._broken = True
            if self._is_newcomer(message):
                self._original = False
                self._replayable.clear()
            abandoned = [group.inner for group in self._groups.values() if group.inner]
            if self._forming is not None:
                abandoned.append(self._forming)
                self._forming = None
            for group in self._groups.values():
                group.inner = None
                group.again.clear()
            for taken in self._taken.values():
                taken.clear()
            works: list[Any] = []
            for log in self._logs():
                for op in log.pending():
                    op.attempt += 1
                    # The abandoned operation may still write there.
                    self.pool.forget(op.buffers)
                    op.buffers = []
                if isinstance(log, Channel):
                    works += log.abandon()
        for inner in abandoned:
            inner.abort(works)
        threading.Thread(
            target=self._recover, args=(message,), name=f"recover-{message.generation}", daemon=True
        ).start()

    def _is_newcomer(self, message: Generation) -> bool:
        return message.rank in message.newcomers and not self._consistent

    def _is_superseded(self, message: Generation) -> bool:
        return self._announced is not message

    def _check(self, message: Generation) -> None:
        if self._is_superseded(message):
            raise Superseded

    def _recover(self, message: Generation) -> None:
        try:
            formed = self._recover_once(message)
        except Superseded:
            return
        except TrainOnceError as error:
            formed = Formed(generation=message.generation, step=self.commits, error=str(error))
        except RuntimeError as error:
            # A peer went away while we were at it. The controller will announce anew.
            if not self._is_superseded(message):
                self._notify(PeerLost(generation=message.generation, error=str(error)[:500]))
            return
        except Exception as error:
            formed = Formed(
                generation=message.generation,
                step=self.commits,
                error=f"{type(error).__name__}: {error}",
            )
        if formed is not None:
            self._notify(formed)

    def _recover_once(self, message: Generation) -> Formed | None:
        assert self.host is not None
        host = self.host
        newcomer = self._is_newcomer(message)
        first = self.generation == 0 and not message.newcomers
        size = len(message.workers)
        inner = InnerGroup(message.rank, size)
        with self.lock:
            self._check(message)
            self._forming = inner
        inner.form(message.store_port, f"{message.incarnation}/{message.generation}/world")
        host.fault_point("recovery")
        if first:
            self._resume(message, inner)
            host.formed(message)
            return None  # the launcher waits for `Ready`
        received_bytes = 0
        formed: Formed | None = None
        while formed is None:
            completed: list[tuple[GroupLog | Channel, Op]] = []
            try:
                with host.frozen(lambda: self._is_superseded(message)):
                    self._check(message)
                    plan = self._agree(host, inner, fresh=newcomer)
                    received_bytes += self._move_results(plan, inner, completed)
                    if not plan.catch_up:
                        formed = self._hand_over(message, inner, plan, received_bytes)
            finally:
                # Also where the recovery was abandoned: nobody gives them once more.
                for log, op in completed:
                    self._finish(log, op)
            if self.rank in plan.catch_up:
                self._wait_commits(message, plan.commits)
        return formed

    def _agree(self, host: Host, inner: InnerGroup, *, fresh: bool) -> Plan:
        """Exchange what each rank has, and return what is to be done about it."""
        report = self._report(host, fresh=fresh)
        gathered = inner.gather_bytes(json.dumps(report.to_record()).encode())
        reports = [RankReport.from_record(json.loads(one)) for one in gathered]
        self.subgroups_elsewhere |= any(
            len(ranks) < len(reports) for each in reports for ranks in each.groups.values()
        )
        self.messages |= any(each.messages for each in reports)
        for each in reports:
            self._members |= each.groups
            self._ends |= each.channels
        plan = plan_recovery(reports)
        self._order_ranks = plan.order_ranks
        return plan

    def _hand_over(
        self, message: Generation, inner: InnerGroup, plan: Plan, received_bytes: int
    ) -> Formed:
        """Move state, and go on in the new generation. Updates are held back."""
        assert self.host is not None
        host = self.host
        newcomer = self._is_newcomer(message)
        self._replayable.set()
        if newcomer:
            # Its script runs on through set-up, served from the log, to where it restores.
            host.wait_restorable(lambda: self._is_superseded(message))
        digest, moved = self._move_state(plan, inner, host)
        inner.barrier()
        self._check(message)
        formed = Formed(
            generation=message.generation,
            step=plan.restores.get(self.rank, plan.commits),
            recompute=plan.num_recomputed(self.rank) if newcomer else 0,
            bytes_moved=moved + received_bytes,
            digest=digest,
            from_shadow=self.rank in plan.restores,
        )
        self._resume(message, inner)
        host.formed(message)
        return formed

    def _wait_commits(self, message: Generation, commits: int) -> None:
        """Wait until this rank has committed so many steps, for which it has all results."""
        while self.commits < commits:
            self._check(message)
            time.sleep(_POLL_S)

    def _report(self, host: Host, *, fresh: bool) -> RankReport:
        with self.lock:
            logs = self._logs()
            lasting = {interval for log in logs for interval in log.lasting()}
            lasting |= {i for results in self._early.values() for i, _ in results if i <= SETUP}
            intervals = lasting | {SETUP, STAGES, self.commits - 1, self.commits}
            for channel in self._channels.values():
                channel.hand_over()
            return RankReport(
                fresh=fresh,
                commits=self.commits,
                donor=not fresh and host.can_donate(),
                original=self._original,
                groups={
                    **{key: self._members[key] for key in self._early if key in self._members},
                    **{key: group.ranks for key, group in self._groups.items()},
                },
                channels={
                    **{key: self._ends[key] for key in self._early if key in self._ends},
                    **{key: channel.ranks for key, channel in self._channels.items()},
                },
                ops={
                    **self._describe_early(intervals),
                    **{
                        (log.key, interval, seq): (signature, known)
                        for log in logs
                        for interval, seq, signature, known in log.describe(intervals)
                    },
                },
                shards=[] if fresh else host.shards,
                shadows=host.shadow_commits() if fresh else [],
                dropped=bool(self._dropped & intervals),
                since=self._since,
                messages=self.messages,
            )

    def _describe_early(self, intervals: set[int]) -> dict[OpName, tuple[str, int]]:
        """Return what is known of operations of groups and channels that are not made here yet."""
        found: dict[OpName, tuple[str, int]] = {}
        for key, results in self._early.items():
            sends = key not in self._ends or self._ends[key][0] == self.rank
            for (interval, seq), (signature, _) in results.items():
                if interval in intervals:
                    found[key, interval, seq] = (
                        signature,
                        int(Channel.ahead(interval, sends=sends)),
                    )
        return found

    def _move_state(self, plan: Plan, inner: InnerGroup, host: Host) -> tuple[str, int]:
        if self.rank in plan.restores:
            return host.restore(plan)
        for donation in plan.donations:
            if self.rank in donation.sources:
                host.fault_point("donate")
                digest, _ = host.donate(inner, donation)
                return digest, 0
            if self.rank in donation.targets:
                return host.receive(inner, donation, plan)
        return "", 0

    def _move_results(
        self, plan: Plan, inner: InnerGroup, completed: list[tuple[GroupLog | Channel, Op]]
    ) -> int:
        """Hand logged results over; return how many bytes came.

        Args:
            plan: Who gives what.
            inner: The new inner group.
            completed: Gets the operations that now have their result.
        """
        received_bytes = 0
        with self.lock:
            for key, interval, seq in plan.again:
                if key in self._groups:
                    self._groups[key].again.add((interval, seq))
            for key, interval, seq in plan.taken:
                self._taken.setdefault(key, set()).add((interval, seq))
            for channel in self._channels.values():
                channel.drop_taken()
        for transfer in plan.results:
            key, interval, seq = transfer.name
            if self.rank == transfer.source:
                with self.lock:
                    result = self._result(key, interval, seq)
                for target in transfer.targets:
                    send_tensors(inner, target, result)
            elif self.rank in transfer.targets:
                tensors = receive_tensors(inner, transfer.source)
                received_bytes += sum(tensor.nbytes for tensor in tensors)
                completed.extend(self._place(transfer, tensors))
        return received_bytes

    def _log(self, key: str) -> GroupLog | Channel | None:
        return self._groups.get(key) or self._channels.get(key)

    def _result(self, key: str, interval: int, seq: int) -> list[torch.Tensor]:
        log = self._log(key)
        return self._early[key][interval, seq][1] if log is None else log.result(interval, seq)

    def _place(
        self, transfer: ResultTransfer, tensors: list[torch.Tensor]
    ) -> list[tuple[GroupLog | Channel, Op]]:
        key, interval, seq = transfer.name
        with self.lock:
            log = self._log(key)
            if log is None:
                early = self._early.setdefault(key, {})
                early[interval, seq] = (transfer.signature, tensors)
                return []
            op = log.ops.get(interval, {}).get(seq)
            if op is None:
                log.keep(interval, seq, transfer.signature, tensors)
            elif op.state is OpState.PENDING:
                op.state, op.buffers = OpState.DELIVERING, tensors
                return [(log, op)]
        return []

    def _resume(self, message: Generation, inner: InnerGroup) -> None:
        """Use the new inner group, and issue again what nobody has completed."""
        with self.lock:
            self._check(message)
            self._forming = None
            self.generation = message.generation
            self._progress["generation"] = message.generation
            self._broken = False
            self._consistent = True
            for group in self._groups.values():
                if group is self.world:
                    group.inner = inner
                    self._issue_all(group)
                else:
                    self._form_beside(group, message)

    def _form_beside(self, group: GroupLog, message: Generation) -> None:
        """Form the inner group of a group other than the world, without waiting for it."""
        if self.rank not in group.ranks:
            return
        inner = InnerGroup(group.ranks.index(self.rank), len(group.ranks))

        def form() -> None:
            prefix = f"{message.incarnation}/{message.generation}/{group.key}"
            try:
                inner.form(message.store_port, prefix)
            except RuntimeError as error:
                with self.lock:
                    if not self._is_superseded(message):
                        self._inner_failed(str(error))
                return
            with self.lock:
                if self._is_superseded(message):
                    inner.abort()
                    return
                group.inner = inner
                self._issue_all(group)

        threading.Thread(target=form, name=f"form-{group.key}", daemon=True).start()
