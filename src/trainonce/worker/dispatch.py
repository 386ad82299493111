"""The dispatcher: hands operations to the inner groups, and their results to the callers.

Inner groups live for one generation. Between two, operations wait in the journal; they are
issued when their group has formed anew. A result that an abandoned inner group still gives is
told by the attempt that it belongs to, and not used.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from trainonce.wire.messages import PeerLost
from trainonce.worker.channel import Channel
from trainonce.worker.inner import InnerGroup
from trainonce.worker.operation import OpState

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.wire.messages import Generation, Message
    from trainonce.wire.progress import Progress
    from trainonce.worker.journal import Journal, Log
    from trainonce.worker.operation import Op
    from trainonce.worker.oplog import GroupLog


class Dispatcher:
    """What is under way on the inner groups of one generation after another.

    Training threads issue and wait; threads of gloo complete collectives; whoever waits for a
    message completes it; the thread that hears of a new generation abandons what is under way,
    and a recovery connects again. The journal's lock guards all of it. It is not held while a
    result is copied to its caller, but where an inner group completes what it is being given.

    Args:
        journal: The operations.
        progress: Page on which to count them.
        notify: Sends a message to the controller.
    """

    def __init__(
        self, journal: Journal, progress: Progress, notify: Callable[[Message], object]
    ) -> None:
        self._journal = journal
        self._lock = journal.lock
        self._progress = progress
        self._notify = notify
        self._generation: Generation | None = None
        self._reported_lost = 0
        self._forming: set[InnerGroup] = set()
        # A message was issued or has arrived.
        self._message_moved = threading.Condition(journal.lock)

    # ------------------------------------------------------------------ training threads

    def dispatch(self, log: Log, op: Op) -> None:
        """Issue what was just logged, if its inner group is there. The lock is held."""
        self._progress["issued"] += 1
        if self._generation is None or log.inner is None:
            return
        if isinstance(log, Channel):
            self._issue_messages(log)
        elif op.state is OpState.PENDING:
            self._issue(log, op)

    def finish(self, log: Log, op: Op) -> None:
        """Give the caller of `op` its result, or what became of the attempt.

        By the one thread that set it DELIVERING, without the lock: callbacks run here.
        """
        failure: Exception | None = None
        try:
            op.deliver(op.buffers)
        except Exception as error:  # the caller's tensor does not take it
            failure = error
        with self._lock:
            self._progress["completed"] += 1
            self._journal.close(log, op)
            if isinstance(log, Channel):
                self._message_moved.notify_all()
        if failure is None:
            op.future.set_result(op.value)
        else:
            op.future.set_exception(failure)
        op.let_go()

    def wait(self, log: Log, op: Op) -> None:
        """Wait until the caller of `op` has its result."""
        # gloo tells nobody that a message has come: who needs it waits for it.
        while isinstance(log, Channel) and self._await_message(log, op):
            pass
        op.future.wait()

    def drain(self) -> None:
        """Wait for every operation issued so far."""
        for log, op in self._journal.unfinished():
            self.wait(log, op)

    def _await_message(self, channel: Channel, op: Op) -> bool:
        """Wait for a message on this thread; return whether it is still to come."""
        with self._lock:
            self._message_moved.wait_for(
                lambda: op.work is not None or op.state is not OpState.PENDING
            )
            if op.state is not OpState.PENDING or op.awaited:
                return False
            work, attempt, op.awaited = op.work, op.attempt, True
        error = _failure_of(work.wait)
        with self._lock:
            op.awaited = False
            if op.attempt != attempt or op.state is not OpState.PENDING:
                return True
            if error:
                op.work = None
                self._peer_lost(error)
                return True
            op.state = OpState.DELIVERING
        self.finish(channel, op)
        return False

    # ------------------------------------------------------------------ on the inner groups

    def _issue(self, log: Log, op: Op) -> None:
        """Hand `op` to its inner group. The lock is held."""
        op.attempt += 1
        attempt = op.attempt
        try:
            work, op.buffers = op.launch(log.inner)  # type: ignore[arg-type]
        except RuntimeError as error:
            self._peer_lost(str(error))
            return
        if isinstance(log, Channel):
            # Of what is sent too: gloo does not send for a work that is gone.
            op.work = work
            self._message_moved.notify_all()
            return
        work.get_future().add_done_callback(lambda done: self._complete(log, op, attempt, done))

    def _issue_messages(self, channel: Channel) -> None:
        """Hand what the other end lacks, or may send, to the inner group. The lock is held."""
        for op in channel.to_issue():
            self._issue(channel, op)

    def _complete(self, log: Log, op: Op, attempt: int, done: Any) -> None:
        """On a thread of gloo, or where `_issue` found it complete: the inner group is done."""
        error = _failure_of(done.value)
        with self._lock:
            if op.attempt != attempt or op.state is not OpState.PENDING:
                return
            if error:
                self._peer_lost(error)
                return
            op.state = OpState.DELIVERING
        self.finish(log, op)

    def _serve_again(self, group: GroupLog, op: Op) -> None:
        """Issue an operation that is complete here, for those who lack it. The lock is held."""
        try:
            work, buffers = op.launch(group.inner)  # type: ignore[arg-type]
        except RuntimeError as error:
            self._peer_lost(str(error))
            return
        generation = self._generation

        def served(done: Any) -> None:
            error = _failure_of(done.value)
            with self._lock:
                if not error:
                    self._journal.pool.give(buffers)
                    return
                self._journal.pool.forget(buffers)
                if generation is self._generation:
                    self._peer_lost(error)

        work.get_future().add_done_callback(served)

    def _peer_lost(self, error: str) -> None:
        """Tell the controller, once a generation. The lock is held."""
        generation = self._generation
        if generation is None or self._reported_lost == generation.generation:
            return
        self._reported_lost = generation.generation
        self._notify(PeerLost(generation=generation.generation, error=error[:500]))

    # ------------------------------------------------------------------ generations

    @property
    def connected(self) -> bool:
        """Whether operations go out at once."""
        return self._generation is not None

    def disconnect(self) -> tuple[list[InnerGroup], list[Any]]:
        """Give up what is under way; from here on operations wait. The lock is held.

        Returns:
            Inner groups to abort, and the works of messages that go down with them.
        """
        self._generation = None
        journal = self._journal
        abandoned = [group.inner for group in journal.groups.values() if group.inner]
        abandoned += self._forming
        self._forming.clear()
        works: list[Any] = []
        for group in journal.groups.values():
            group.inner = None
            group.again.clear()
        for taken in journal.taken.values():
            taken.clear()
        for log in journal.logs():
            for op in log.pending():
                op.attempt += 1
                # The abandoned operation may still write there.
                journal.pool.forget(op.buffers)
                op.buffers = []
            if isinstance(log, Channel):
                works += log.abandon()
        return abandoned, works

    def connect(self, generation: Generation, inner: InnerGroup) -> None:
        """Go on in `generation`: issue what was not completed, and what others lack.

        The lock is held.

        Args:
            generation: Whose inner groups are used from here on.
            inner: That of the world; those of other groups form without being waited for.
        """
        self._generation = generation
        self._progress["generation"] = generation.generation
        for group in self._journal.groups.values():
            if group is self._journal.world:
                self._attach(group, inner)
            else:
                self.form(group)

    def form(self, group: GroupLog) -> None:
        """Form the inner group of a group other than the world, on a thread of its own.

        The lock is held, and there is a generation.
        """
        generation = self._generation
        assert generation is not None
        if generation.rank not in group.ranks:
            return
        inner = InnerGroup(group.ranks.index(generation.rank), len(group.ranks))
        self._forming.add(inner)

        prefix = f"{generation.incarnation}/{generation.generation}/{group.key}"

        def form() -> None:
            error = _failure_of(lambda: inner.form(generation.store_port, prefix))
            with self._lock:
                if inner not in self._forming:
                    return  # abandoned with its generation
                self._forming.discard(inner)
                if error:
                    self._peer_lost(error)
                else:
                    self._attach(group, inner)

        threading.Thread(target=form, name=f"form-{group.key}", daemon=True).start()

    def _attach(self, group: GroupLog, inner: InnerGroup) -> None:
        """Carry the operations of `group` out on `inner` from here on. The lock is held."""
        group.inner = inner
        for op in group.to_issue():
            if op.state is OpState.PENDING:
                self._issue(group, op)
            else:
                self._serve_again(group, op)
        for channel in self._journal.channels.values():
            if channel.group is group:
                self._issue_messages(channel)


def _failure_of(outcome: Callable[[], object]) -> str:
    """Return why an operation of an inner group failed; empty where it did not."""
    try:
        outcome()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""
