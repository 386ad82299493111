"""The way of a script to the last commit, where another process made it.

A process that takes a rank over begins its script at the beginning. Steps that are committed
return what was recorded of them, collectives between steps what they gave the first time; where the
last commit is reached, everything that code between steps may have changed is put back to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainonce.events import ValueLost
from trainonce.wire.messages import Note, Report
from trainonce.worker.values import lost

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    import torch

    from trainonce.worker.cursor import Cursor, Position
    from trainonce.worker.local import LocalState
    from trainonce.worker.loops import Loops
    from trainonce.worker.operation import Op, Outcome
    from trainonce.worker.passes import Passes
    from trainonce.worker.spare import Promotion


class Replay:
    """Answers for what is behind the last commit. All on the training thread.

    Args:
        cursor: Where the script stands.
        local: Recorded values, and the script's variables.
        loops: The open loops.
        passes: The DDPs and pipelines.
        promotion: The rank, now or later.
        return_state: Puts protected state and generators back to the last commit, and returns
            the committed steps.
        notify: Sends a message to the launcher.
    """

    def __init__(
        self,
        *,
        cursor: Cursor,
        local: LocalState,
        loops: Loops,
        passes: Passes,
        promotion: Promotion,
        return_state: Callable[[], int],
        notify: Callable[..., object],
    ) -> None:
        self._cursor = cursor
        self._local = local
        self._loops = loops
        self._passes = passes
        self._promotion = promotion
        self._return_state = return_state
        self._notify = notify
        self._recalled: Outcome | None = None
        self.lost_at: int | None = None
        """How many steps were committed with the one whose value was lost, if one was."""

    @property
    def is_under_way(self) -> bool:
        """Whether the script has still to come to the last commit."""
        return self._cursor.behind

    def begin_iteration(self, frame: FrameType) -> None:
        """A loop of ours begins an iteration in `frame`."""
        if self._cursor.behind:
            self._local.variables.anticipate(frame)
        else:
            self._local.begin_iteration()

    def commits(self) -> int | None:
        """Return how many steps were committed when the script was here first, if it is known."""
        return self._local.values.commits_before(self._cursor.place())

    # ------------------------------------------------------------------ steps

    def value(self, position: Position, caller: FrameType) -> Any:
        """Return what the committed step at `position` returned, or LOST.

        Args:
            position: Of the call.
            caller: Where it is called.
        """
        known, value = self._local.values.get(position)
        if position != self._cursor.committed:
            self._local.variables.begin(caller)
            if position == self._local.opening:
                self._local.variables.anticipate(caller)
            self._passes.skip_step()
        elif self._cursor.behind:
            commits = self.finish(caller)
            if not known:
                self.lost_at = commits
                lost_value = ValueLost(rank=self._promotion.rank, step=commits)
                self._notify(Report(event=lost_value.to_record()))
                self._warn(
                    "value-lost",
                    f"what rank {self._promotion.rank} returned from step {commits} went down with"
                    " its process: the script gets trainonce.LOST for it (averages of run.mean are"
                    " known, without this rank's share)",
                )
        return value if known else lost(value)

    def finish(self, caller: FrameType) -> int:
        """Undo what code between steps did on its way here: it is part of the last commit.

        Args:
            caller: Where the step of the last commit is called, or the next one where the script
                took another way than before.

        Returns:
            The committed steps.
        """
        self._cursor.behind = False
        commits = self._return_state()
        self._local.return_to_commit(caller)
        self._loops.return_to_commit()
        self._passes.return_to_commit()
        if missing := self._local.variables.missing:
            self._warn(
                "variables-left-out",
                "variables of the script that cannot come along when a rank is taken"
                f" over: {', '.join(missing[:5])}. What the script needs of them belongs in"
                " run.state",
            )
        return commits

    # ------------------------------------------------------------------ collectives between steps

    def note_collective(self, op: Op) -> None:
        """Take note of a collective that the script issues between steps."""
        self._local.note_collective(self._cursor.enter_collective(), op)

    def is_behind_others(self, kind: str, tensors: list[torch.Tensor]) -> bool:
        """Tell whether the other ranks have a collective of the script behind them.

        The result, where it was kept, is then what `recalled` returns.
        """
        self._recalled = None
        if not self._cursor.behind:
            return False
        kept = self._local.result(self._cursor.enter_collective())
        if kept is not None and _could_be(kept, kind, tensors):
            self._recalled = kept
        else:  # not kept, or the script came here by another way
            self._warn(
                "collective-between",
                "a process that takes a rank over came to a collective between steps whose result"
                " was not kept: it got this rank's own contribution. Loops of run.batches and"
                " run.epochs do not go through what is long past",
            )
        return True

    @property
    def has_recalled(self) -> bool:
        """Whether `recalled` has a result to give."""
        return self._recalled is not None

    def recalled(self) -> Outcome | None:
        """Take the result of the collective that `is_behind_others` was asked about last."""
        recalled, self._recalled = self._recalled, None
        return recalled

    def _warn(self, key: str, text: str) -> None:
        self._notify(Note(key=key, level="warning", text=text))


def _could_be(recalled: Outcome, kind: str, tensors: list[torch.Tensor]) -> bool:
    """Tell whether a kept result is of such a collective."""
    signature, results = recalled
    if signature.partition("(")[0] != kind:
        return False
    if not tensors:
        return True
    one, kept = tensors[0], results[0]
    return (one.numel(), one.dtype) == (kept.numel(), kept.dtype)
