"""The journal: every operation of this worker that somebody may still ask for.

It holds the logs of all groups and channels, and the results that came for some that the script
has not made yet. It says in which interval operations are numbered, and when they are freed.
It issues nothing: that is the dispatcher's.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from trainonce.worker.buffers import BufferPool
from trainonce.worker.channel import Channel, known_of_arrived
from trainonce.worker.operation import SETUP, STAGES, UNSHARED, OpState
from trainonce.worker.oplog import GroupLog, Unclaimed

if TYPE_CHECKING:
    import torch

    from trainonce.worker.operation import Op, Outcome
    from trainonce.worker.plan import OpName, Plan

_WORLD = "world"
# How often an interval is measured that has operations outside of steps.
MEASURED_EVERY = 1 << 8

Log = GroupLog | Channel


class Journal:
    """The logs of this worker.

    `lock` guards them and every operation in them. Methods are called with it held, from any
    thread, unless they say that they take it.

    Args:
        world_size: Number of ranks of the job.
    """

    def __init__(self, world_size: int) -> None:
        self.lock = threading.RLock()
        self.pool = BufferPool()
        self.interval = SETUP
        """In which operations are numbered now."""
        self.commits = 0
        self.since = 0
        """Committed steps with which this process began: what came before, it has no log of."""
        self.keeps_step = False
        """Where state is rebuilt from shadows, a step's results stay until all have one past it.
        An operation that `settles` says so."""
        self.world = GroupLog(_WORLD, list(range(world_size)), spans_world=True)
        self.groups: dict[str, GroupLog] = {_WORLD: self.world}
        self.channels: dict[str, Channel] = {}
        self.taken: dict[str, set[tuple[int, int]]] = {}
        """Messages that their targets have, by channel: also of channels not made yet."""
        self.unclaimed: dict[str, Unclaimed] = {}
        """Results for groups and channels that the script has not made yet."""
        self.members: dict[str, list[int]] = {}
        """Ranks of the groups that any process has made."""
        self.ends: dict[str, list[int]] = {}
        """Source and target of the channels that any process has made."""
        self.num_issued = 0
        """World operations of this interval, less those of the runtime itself."""
        self._released = SETUP
        """Nothing is left of the intervals before this one."""
        self._dropped: set[int] = set()
        """Intervals of which results were dropped, since there were too many outside of steps."""

    # ------------------------------------------------------------------ groups and channels

    def logs(self) -> list[Log]:
        """Return the logs of all groups and channels."""
        return [*self.groups.values(), *self.channels.values()]

    def find_log(self, key: str) -> Log | None:
        """Return a group's or channel's log; None if it was not made here yet."""
        return self.groups.get(key) or self.channels.get(key)

    def add_group(self, key: str, ranks: list[int]) -> GroupLog:
        """Begin the log of a group beside the world."""
        group = GroupLog(key, ranks, spans_world=len(ranks) == len(self.world.ranks))
        self.groups[key] = group
        self._claim(group)
        return group

    def channel(
        self, group: GroupLog, source: int, target: int, tag: int, *, sends: bool, stages: str
    ) -> Channel:
        """Return the channel from one rank of `group` to another, of which this rank is one."""
        key = Channel.name(group, source, target, tag, stages)
        found = self.channels.get(key)
        if found is None:
            taken = self.taken.setdefault(key, set())
            found = Channel(group, source, target, tag, sends=sends, stages=stages, taken=taken)
            self.channels[key] = found
            self._claim(found)
        return found

    def _claim(self, log: Log) -> None:
        log.unclaimed.update(self.unclaimed.pop(log.key, ()))

    # ------------------------------------------------------------------ messages

    def balance(self) -> int:
        """Return a number whose sum over all ranks is 0 if all that was sent was received.

        Messages of this interval and of set-up count. Takes the lock.
        """
        with self.lock:
            return sum(
                channel.balance(self.interval)
                for channel in self.channels.values()
                if not channel.stages
            )

    def describe_messages(self) -> str:
        """Return in words what this rank has sent and received in this interval. Takes the lock."""
        with self.lock:
            found = [
                f"{channel.num_issued(self.interval)} {word} rank {channel.other_end}"
                for word, sends in (("to", True), ("from", False))
                for channel in self.channels.values()
                if channel.sends is sends and channel.num_issued(self.interval)
            ]
        return ", ".join(found) or "none"

    def retire_stages(self, pipeline: str, present: str) -> None:
        """Let go, at the next commit, of what the stages of a pipeline said in earlier turns.

        Args:
            pipeline: Its name.
            present: Its name and the turn that begins now.
        """
        for channel in self.channels.values():
            if channel.stages.startswith(f"{pipeline}/") and channel.stages != present:
                channel.last_interval = min(channel.last_interval, self.interval)

    # ------------------------------------------------------------------ an operation's life

    def add(self, log: Log, op: Op, interval: int | None) -> bool:
        """Log `op` where it belongs; return whether its result is known already.

        Args:
            log: Of its group or channel.
            op: What the caller is about to issue.
            interval: One of its own, or None for the present one.

        Raises:
            CollectiveError: Another operation has that place on the other ranks.
        """
        given = op.buffers
        known = log.add(op, self.interval if interval is None else interval)
        if op.buffers is not given:
            self.pool.give(given)
        if log is self.world and op.interval == self.interval and not op.settles:
            self.num_issued += 1
        return known

    def bound(self, log: Log, op: Op) -> bool:
        """Keep what operations outside of steps leave behind within bounds.

        Looks with every 256th only.

        Returns:
            Whether results were dropped that a newcomer could ask for.
        """
        if op.seq % MEASURED_EVERY != MEASURED_EVERY - 1:
            return False
        if not log.drop_if_too_many(op.interval, self.pool):
            return False
        self._dropped = {old for old in self._dropped if old <= SETUP or old >= self.commits - 1}
        self._dropped.add(op.interval)
        return True

    def close(self, log: Log, op: Op) -> None:
        """Take note that the caller of `op` has its result, and free what that allows."""
        log.close(op)
        arrived = isinstance(log, Channel) and not log.sends and op.interval != STAGES
        if op.interval == UNSHARED or op.kept or arrived:
            self.pool.give(op.buffers)
            op.buffers = []
        # Every rank has issued this one, hence committed what came before it.
        passed = op.settles or not self.keeps_step
        if log.spans_world and passed and op.interval == self.interval > self._released:
            self._release_before(op.interval)

    def unfinished(self) -> list[tuple[Log, Op]]:
        """Return the operations whose result has not reached the caller. Takes the lock."""
        with self.lock:
            return [(log, op) for log in self.logs() for op in log.open]

    # ------------------------------------------------------------------ intervals

    def start_at(self, commits: int) -> None:
        """Leave set-up: operations from now on belong to step `commits`. Takes the lock."""
        with self.lock:
            self.commits = self.interval = self.since = commits
            self.num_issued = 0

    def commit(self) -> None:
        """Close the interval. The caller holds the update gate. Takes the lock."""
        with self.lock:
            if not self.keeps_step:
                for log in self.logs():
                    log.release_early(self.interval, self.pool)
            self.commits += 1
            self.interval = self.commits
            self.num_issued = 0

    def spanned(self) -> bool:
        """Tell whether an operation over all ranks was issued in this interval. Takes the lock."""
        with self.lock:
            return any(
                group.spans_world and group.ops.get(self.interval) for group in self.groups.values()
            )

    def knows(self, interval: int) -> bool:
        """Tell whether results for `interval` wait to be asked for. Takes the lock."""
        with self.lock:
            return any(interval in group.unclaimed.intervals() for group in self.groups.values())

    def _release_before(self, interval: int) -> None:
        """Free what no rank can ask for any more: all have committed `interval` - 1."""
        self._released = interval
        for log in self.logs():
            log.release_before(interval, self.pool)
        for key in [key for key, each in self.channels.items() if each.last_interval < interval]:
            del self.channels[key], self.taken[key]
        for results in self.unclaimed.values():
            results.release_before(interval, self.pool)

    # ------------------------------------------------------------------ a recovery

    def reported_intervals(self) -> set[int]:
        """Return the intervals of which a newcomer may need results."""
        found = {SETUP, STAGES, self.commits - 1, self.commits}
        for log in self.logs():
            found |= log.lasting()
        for results in self.unclaimed.values():
            found |= {interval for interval in results.intervals() if interval <= SETUP}
        return found

    def has_dropped(self, intervals: set[int]) -> bool:
        """Tell whether results of any of `intervals` are no longer kept."""
        return bool(self._dropped & intervals)

    def describe(self, intervals: set[int], rank: int) -> dict[OpName, tuple[str, int]]:
        """Return the name of each operation of `intervals`, its signature, and what can be given.

        Args:
            intervals: Those that are asked for.
            rank: This one.
        """
        found: dict[OpName, tuple[str, int]] = {}
        for key, results in self.unclaimed.items():
            sends = key not in self.ends or self.ends[key][0] == rank
            for interval, seq, signature, known in results.describe(
                intervals, lambda interval, sends=sends: known_of_arrived(interval, sends=sends)
            ):
                found[key, interval, seq] = (signature, known)
        for log in self.logs():
            for interval, seq, signature, known in log.describe(intervals):
                found[log.key, interval, seq] = (signature, known)
        return found

    def groups_known(self) -> dict[str, list[int]]:
        """Return the members of each group that is made here, or of which results are."""
        unclaimed = {key: self.members[key] for key in self.unclaimed if key in self.members}
        return unclaimed | {key: group.ranks for key, group in self.groups.items()}

    def channels_known(self) -> dict[str, list[int]]:
        """Return source and target of each channel that is made here, or of which results are."""
        unclaimed = {key: self.ends[key] for key in self.unclaimed if key in self.ends}
        return unclaimed | {key: channel.ranks for key, channel in self.channels.items()}

    def result(self, name: OpName) -> list[torch.Tensor]:
        """Return the logged result of an operation that has one. Takes the lock."""
        key, interval, seq = name
        with self.lock:
            log = self.find_log(key)
            op = log.find(interval, seq) if log is not None else None
            if op is not None:
                return op.buffers
            results = self.unclaimed[key] if log is None else log.unclaimed
            return results[interval, seq][1]

    def place(self, name: OpName, outcome: Outcome) -> tuple[Log, Op] | None:
        """Take a result that another rank had; keep it if it was not asked for. Takes the lock.

        Returns:
            The operation that waits for it: the caller has to finish it.
        """
        key, interval, seq = name
        with self.lock:
            log = self.find_log(key)
            op = log.find(interval, seq) if log is not None else None
            if log is not None and op is not None:
                if op.state is not OpState.PENDING:
                    return None
                op.state, op.buffers = OpState.DELIVERING, outcome[1]
                self.pool.adopt(outcome[1])
                return log, op
            results = self.unclaimed.setdefault(key, Unclaimed()) if log is None else log.unclaimed
            if (interval, seq) not in results:  # else an abandoned recovery has brought it
                results[interval, seq] = outcome
                self.pool.adopt(outcome[1])
            return None

    def follow(self, plan: Plan) -> None:
        """Take note of what is to be issued once more, and what need not be sent. Takes the lock.

        Args:
            plan: Of the recovery that is under way.
        """
        with self.lock:
            for key, interval, seq in plan.again:
                if key in self.groups:
                    self.groups[key].again.add((interval, seq))
            for key, interval, seq in plan.taken:
                self.taken.setdefault(key, set()).add((interval, seq))
            for channel in self.channels.values():
                channel.drop_taken()
