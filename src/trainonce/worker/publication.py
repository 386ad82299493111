"""What a rank makes known of a step before the others may commit it.

A commit needs no vote: once a rank has the results of the step's collectives, it commits. So before
the last of them each rank publishes what a successor of it would need to know of that commit. Where
the last one is not known beforehand, or more changes after it, ranks wait for each other.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from trainonce import settings
from trainonce.errors import CollectiveError, ConfigError
from trainonce.wire.messages import Note
from trainonce.worker.foreseen import reports_of, stood_in_variables
from trainonce.worker.step import UpdateKind

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from trainonce.worker.fabric import Fabric
    from trainonce.worker.local import LocalState
    from trainonce.worker.state import Protected
    from trainonce.worker.step import Execution

# Copies of a smaller state are not worth a word.
_TOLD_BYTES = 1 << 20
_MOST_COPIED_MB = 100.0


class Publication:
    """Publishes local state in time, alone or together with the other ranks.

    Args:
        fabric: Carries out the collectives in which ranks wait for each other.
        local: What is published.
        protected: Knows the buffers that differ by rank.
        notify: Tells the launcher.
    """

    def __init__(
        self,
        fabric: Fabric,
        local: LocalState,
        protected: Protected,
        notify: Callable[[Note], object],
    ) -> None:
        self._fabric = fabric
        self._local = local
        self._protected = protected
        self._notify = notify
        self._most_copied_bytes = _most_copied_bytes()
        self.waits = False
        """Whether ranks wait for each other now, in a collective of ours."""

    # ------------------------------------------------------------------ by itself

    def before_operation(self, execution: Execution) -> None:
        """Publish if the collective about to be issued may be the last one of the step."""
        if self._protected.hooks:
            return  # hooks change what they keep until the last gradient is reduced
        issued = self._fabric.num_issued() - execution.operations_before
        if execution.profile.may_be_last(issued):
            self.ahead(execution)
            self._take_snapshot(execution)

    def ahead(self, execution: Execution, *, looks: bool = True) -> None:
        """Publish local state for the commit to come, before this rank lets the others commit.

        Args:
            execution: The step.
            looks: Whether buffers that have changed by now are ones of forward passes. After the
                update they may be a part of it, such as the count of a moving average.
        """
        if looks:
            self._protected.note_local_buffers()
        profile, foreseen = execution.profile, execution.profile.foreseen
        if profile.looks_again or profile.kind is UpdateKind.UNKNOWN:
            taken = self._local.take_variables(execution.caller)
            execution.changed_ahead |= taken is not execution.variables
        if execution.ended:
            self._local.keep_value(execution.position, execution.value, execution.commits + 1)
        elif not profile.changes_late:  # else it is published once more at its end
            execution.seen = foreseen.look(execution.caller, execution.thread) or execution.seen
            execution.returns = foreseen.returned(execution.seen, profile.returns)
        self._local.publish(
            self._protected,
            execution.position,
            execution.commits + 1,
            execution.means,
            final=False,
            shares=foreseen.means(execution.seen, execution.means),
            returns=execution.returns,
        )
        execution.published = True

    def before_update(self, execution: Execution) -> None:
        """Where later executions publish here and not before, begin to look for changes here."""
        if execution.snapshot is None or self.is_always_together:
            self._take_snapshot(execution)

    def _take_snapshot(self, execution: Execution) -> None:
        """In a first execution, keep what tells whether local state changes from here on."""
        if execution.profile.kind is UpdateKind.UNKNOWN:
            execution.snapshot = self._local.snapshot(self._protected, execution.means)

    def at_commit(self, execution: Execution) -> None:
        """Publish what holds at the commit, and learn from the step for the next executions."""
        self._local.take_variables(execution.caller)
        self._local.publish(
            self._protected,
            execution.position,
            execution.commits + 1,
            execution.means,
            final=True,
            returns=execution.returns,
        )
        profile = execution.profile
        profile.operations.append(self._fabric.num_issued() - execution.operations_before)
        if not profile.changes_late:
            profile.foreseen.learn(execution.seen, reports_of(execution.shares(), execution.value))

    # ------------------------------------------------------------------ with the other ranks

    @property
    def is_always_together(self) -> bool:
        """Whether no rank updates before all have what they need of the step, in every step."""
        fabric = self._fabric
        return fabric.has_subgroups or fabric.messages or fabric.journal.keeps_step

    def is_together(self, execution: Execution) -> bool:
        """Tell whether no rank updates before all have what they need of this step."""
        # The first execution tells all ranks whether there are messages between some of them.
        return self.is_always_together or execution.profile.kind is UpdateKind.UNKNOWN

    def wait_if_late(self, execution: Execution) -> None:
        """Where nothing was published ahead of the last collective, wait until all ranks have.

        So it is where a step issues fewer collectives than lately, and with stateful hooks of
        DDP. Otherwise one could commit while another, which has published nothing, dies.
        """
        if not execution.published:
            self.ahead(execution, looks=not execution.profile.changes_late)
            self.barrier()

    def before_commit(self, execution: Execution) -> None:
        """Wait for the other ranks where one could not commit this step by itself.

        Also bounds how far ranks drift apart, and lets the log of the step before go.
        """
        if execution.profile.kind is UpdateKind.UNKNOWN:
            self._learn_what_changes_late(execution)
        late = execution.profile.changes_late
        if late:
            self._local.take_variables(execution.caller)
        if self.is_together(execution):
            while not execution.agreed or execution.meets_again:
                self.meet(execution, last=True)
            return
        if late:
            execution.published = False
        self.wait_if_late(execution)
        if not self._fabric.spanned():
            self.barrier()

    def _learn_what_changes_late(self, execution: Execution) -> None:
        """Find out, in the first execution, whether local state changes after the last collective.

        So it does with what the step reports, if no variable held that before. A process that dies
        between that and the commit would take the change with it. So from then on all ranks publish
        at the end, and wait for each other before they commit. Whether they do must be known to
        all, and `run.state` may change on one of them only.
        """
        self._local.take_variables(execution.caller)
        now = self._local.snapshot(self._protected, execution.means)
        late = execution.snapshot not in (None, now) or self._reports_late(execution)
        votes = torch.tensor([int(late), int(execution.changed_ahead)])
        with self._waiting():
            dist.all_reduce(votes)
        late, ahead = votes.tolist()
        execution.profile.looks_again = ahead > 0
        if late > 0:
            execution.profile.changes_late = True
            execution.kind = max(execution.kind, UpdateKind.LATE)

    def _reports_late(self, execution: Execution) -> bool:
        """Tell whether a first execution reported what is worth waiting for in later ones."""
        if stood_in_variables(execution.seen, execution.shares(), execution.value):
            return False
        if not execution.stepped:  # nothing has to be copied
            return True
        size, most = self._protected.num_bytes(), self._most_copied_bytes
        is_exact = size <= most and not self.is_always_together
        if self._fabric.rank == 0 and (size > _TOLD_BYTES or not is_exact):
            self._notify(Note(key="late-report", text=_late_report(size, most, exact=is_exact)))
        return is_exact

    def meet(self, execution: Execution, *, last: bool) -> None:
        """Wait for every rank, and learn what the others know of this step.

        Whether they meet once more before the commit is the same for all: if what precedes
        the update is not all there is, or if something that was sent was not received yet.

        Args:
            execution: The step.
            last: This rank has nothing more to issue in it.

        Raises:
            CollectiveError: Something that was sent in this step was not received in it.
        """
        fabric = self._fabric
        self.ahead(execution, looks=not execution.stepped)
        late = not last and execution.profile.kind >= UpdateKind.LATE
        votes = [fabric.balance(), int(not last), int(late), int(fabric.has_channels)]
        sums = torch.tensor(votes, dtype=torch.int64)
        with self._waiting():
            dist.all_reduce(sums)
        balance, more, late, messages = sums.tolist()
        fabric.messages |= messages > 0
        again = late > 0 or (balance != 0 and more > 0)
        if balance != 0 and not again:
            raise CollectiveError(
                "messages of this step were sent and not received, or the reverse; rank"
                f" {fabric.rank} has {fabric.describe_messages()}",
                hint="receive a message in the step in which it is sent",
            )
        execution.meets_again = again
        execution.agreed = True

    def barrier(self) -> None:
        """Wait for every rank, as an operation of the present interval."""
        with self._waiting():
            dist.barrier()

    @contextmanager
    def _waiting(self) -> Generator[None]:
        self.waits = self._fabric.settling = True
        try:
            yield
        finally:
            self.waits = self._fabric.settling = False


def _most_copied_bytes() -> float:
    given = settings.EXACT_RETURNS_MB.get()
    try:
        megabytes = _MOST_COPIED_MB if given is None else float(given)
    except ValueError:
        megabytes = -1.0
    if not megabytes >= 0:  # not a number, among others
        raise ConfigError(
            f"{settings.EXACT_RETURNS_MB.name} is {given!r}",
            hint="give a number of megabytes, 0 for none",
        )
    return 1e6 * megabytes


def _late_report(size: int, most: float, *, exact: bool) -> str:
    told = (
        f"ranks 0 and 1 copy the state ({size / 1e6:.0f} MB) before each update, so that"
        if exact
        else f"the state ({size / 1e6:.0f} MB) is not copied for that ({most / 1e6:.0f} MB at most,"
        f" {settings.EXACT_RETURNS_MB.name}), so"
    )
    lost = "it is known" if exact else "it is trainonce.LOST"
    return (
        f"a step returns or averages what no variable held before its update: {told} {lost} where a"
        " process dies there. Computed before loss.backward() it costs nothing, and is known"
    )
