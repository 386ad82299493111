"""Durable checkpoints from inside the training loop.

Which commit a checkpoint is taken at must be the same on all ranks, without a vote at every
step. So rank 0 broadcasts, about twice a second (more often where steps are short) and behind
the next step's computation, what is to be done and when it will broadcast next. The broadcast
issued after commit n is read before commit n + 1, where all ranks act on it.
"""

from __future__ import annotations

import enum
import json
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainonce.checkpoint.saver import AsyncSaver, young_interval_s
from trainonce.checkpoint.store import CheckpointStore
from trainonce.checkpoint.tensors import is_mine_to_write
from trainonce.errors import CheckpointError
from trainonce.wire.messages import Note, Report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainonce.checkpoint.manifest import CheckpointInfo
    from trainonce.events import CheckpointSaved
    from trainonce.wire.messages import Message
    from trainonce.worker.runner import Runner
    from trainonce.worker.state import Protected

_POLL_EVERY_S = 0.5
# Steps may become much longer than those that the distance to the next poll was computed from.
_POLL_EVERY_STEPS = 64
_FIRST_INTERVAL_S = 300.0
_SHORTEST_INTERVAL_S = 30.0
# Note in the manifest: not all ranks hold the same names, so names have a prefix.
_PARTS = "parts"
# Between failures that leave no living copy, which only a checkpoint recovers from.
_MTBF_S = 24 * 3600.0


class Command(enum.IntFlag):
    """What all ranks do at a commit."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When and how checkpoints are written.

    Args:
        every_s: Seconds between checkpoints; None for Young's interval from measured cost.
        keep_last: How many are kept.
        parameter_dtype: Store parameters in this narrower dtype; a resume is then not exact.
    """

    every_s: float | None = None
    keep_last: int = 3
    parameter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.every_s is not None and self.every_s <= 0:
            raise CheckpointError(
                f"checkpoints every {self.every_s} s", hint="give seconds above 0, or None"
            )
        if self.keep_last < 1:
            raise CheckpointError(f"keep_checkpoints is {self.keep_last}", hint="give 1 or more")


class Durable:
    """Writes checkpoints of one rank's run, in step with the other ranks.

    Args:
        runner: The steps and their state.
        folder: Where the job's checkpoints are.
        settings: When and how.
        notify: Sends a message to the launcher.
        leave: Ends the process after a checkpoint on request.
    """

    def __init__(
        self,
        runner: Runner,
        folder: Path,
        settings: CheckpointSettings,
        notify: Callable[[Message], object],
        leave: Callable[[], object],
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._notify = notify
        self._leave = leave
        self._saver = AsyncSaver(
            CheckpointStore(folder, settings.keep_last), on_saved=self._on_saved
        )
        self._interval_s = settings.every_s or _FIRST_INTERVAL_S
        self._last_mono_s = time.monotonic()
        self._requested = Command.NOTHING
        self._reason = ""
        self._next_poll = 0
        self._command = Command.NOTHING
        self._poll: tuple[torch.Tensor, Any] | None = None
        self._saved_step = -1
        self._request_lock = threading.Lock()

    # ------------------------------------------------------------------ asking for one

    def request(self, command: Command, reason: str) -> None:
        """Ask for a checkpoint at one of the next commits; any thread, effective on rank 0."""
        with self._request_lock:
            self._requested |= command
            self._reason = reason

    def start_at(self, commits: int) -> None:
        """Begin to count from `commits` committed steps."""
        self._next_poll = commits + 1
        self._saved_step = commits

    def read_poll(self) -> tuple[int, Command]:
        """Return when to poll next and what to do at the commit that comes now."""
        if self._poll is None:
            return self._next_poll, Command.NOTHING
        (order, work), self._poll = self._poll, None
        work.wait()
        command, next_poll = order.tolist()
        return next_poll, Command(command)

    def adopt(self, poll: tuple[int, Command]) -> None:
        """Take over what holds as of the commit that is made now."""
        self._next_poll, self._command = poll

    def after_commit(self) -> None:
        """Act on what was ordered for this commit, and issue the next order if it is due."""
        command, self._command = self._command, Command.NOTHING
        if command:
            self._save(self._reason or "interval", wait=Command.STOP in command)
            if Command.STOP in command:
                self._leave()
        if self._runner.commits == self._next_poll:
            order = torch.tensor(self._decide(), dtype=torch.int64)
            self._poll = (order, dist.broadcast(order, 0, async_op=True))

    def _decide(self) -> list[int]:
        """On rank 0: return the command, and the commit after which to ask again."""
        with self._request_lock:
            command, self._requested = self._requested, Command.NOTHING
        if time.monotonic() - self._last_mono_s >= self._interval_s and not self._saver.busy:
            command |= Command.SAVE
            self._reason = self._reason or "interval"
        step_s = max(self._runner.progress["step_ns"] * 1e-9, 1e-6)
        distance = min(max(1, round(_POLL_EVERY_S / step_s)), _POLL_EVERY_STEPS)
        return [int(command), self._runner.commits + distance]

    # ------------------------------------------------------------------ giving it to a newcomer

    def record(self) -> list[int]:
        """Return what a newcomer must know to act in step, as of the last commit."""
        return [self._next_poll, int(self._command)]

    def restore(self, record: list[int]) -> None:
        """Take over what `record` returned on a donor."""
        self._next_poll, self._command = record[0], Command(record[1])

    # ------------------------------------------------------------------ saving

    def save_at_end(self) -> None:
        """Write the last checkpoint, unless this very step has one."""
        try:
            if self._runner.commits != self._saved_step:
                self._save("end", wait=True)
            else:
                self._saver.wait()
        except CheckpointError as error:
            self._complain(error)

    def _save(self, reason: str, *, wait: bool) -> None:
        runner = self._runner
        protected = runner.protected
        assert protected is not None
        replicas = protected.replicas
        owner, prefix = (0, "") if replicas is None else (replicas[0], _prefix(replicas[0]))
        own = protected.states.own_names()
        mine = {
            prefix + name: tensor
            for name, tensor in protected.whole().items()
            if name in own or is_mine_to_write(tensor, runner.rank, owner)
        }
        names = [prefix + name for name, _ in protected.parameters()]
        first = runner.rank == 0
        record = protected.describe_whole() if runner.rank == owner else protected.describe_part()
        tree = json.dumps(record).encode() if record else b""
        dtype = self._settings.parameter_dtype
        try:
            self._saver.save(
                runner.commits,
                rank=runner.rank,
                world_size=runner.world_size,
                nonce=f"{os.environ.get('TRAINONCE_JOB', 'solo')}-{self._next_poll}",
                rank_payload=runner.local.payload,
                state=mine if first else None,
                part=None if first else mine,
                tree=tree,
                split=replicas is not None or protected.states.keeps_a_part,
                model_names=names,
                storage_dtypes=None if dtype is None else dict.fromkeys(names, dtype),
                reason=reason,
                notes={} if replicas is None else {_PARTS: True},
            )
            if wait:
                self._saver.wait()
        except CheckpointError as error:
            self._complain(error)
        self._saved_step = runner.commits
        self._last_mono_s = time.monotonic()
        self._reason = ""

    def _complain(self, error: CheckpointError) -> None:
        self._notify(
            Note(key="checkpoint", level="warning", text=f"a checkpoint failed: {error.message}")
        )

    def _on_saved(self, saved: CheckpointSaved) -> None:
        if self._settings.every_s is None:
            young = young_interval_s(saved.blocked_s, _MTBF_S, write_s=saved.write_s)
            self._interval_s = max(young, _SHORTEST_INTERVAL_S)
        self._notify(Report(event=saved.to_record()))

    # ------------------------------------------------------------------ resuming

    def resume(self, folder: Path, *, beyond: int = -1) -> tuple[int, bytes] | None:
        """Load the newest sound checkpoint in `folder`. Collective: all ranks agree on one.

        Args:
            folder: Of the job.
            beyond: Only one of more committed steps than this.

        Returns:
            Its committed steps, and this rank's local record; None if there is no checkpoint.
        """
        runner = self._runner
        protected = runner.protected
        assert protected is not None
        store = CheckpointStore(folder, self._settings.keep_last)
        info = self._choose(store)
        if info is None or info.step <= beyond:
            return None
        if info.notes.get(_PARTS, False) != (protected.replicas is not None):
            raise CheckpointError(
                f"{info.path} was written {'with' if info.notes.get(_PARTS) else 'without'}"
                " run.protect(..., replicas=...), and this script has it otherwise",
                hint="resume with the script and the mesh that it was written with",
            )
        payload = self._load(store, info, protected)
        if runner.rank == 0:
            text = f"resumed from the checkpoint of step {info.step}"
            self._notify(Note(key=f"resumed-{info.step}", text=text))
        return info.step, payload

    def _load(self, store: CheckpointStore, info: CheckpointInfo, protected: Protected) -> bytes:
        """Load what this rank holds, whole or a part; return its local record."""
        described = store.load(info, verify=False)
        trees = {0: described.tree, **described.part_trees()}
        holders, prefix = list(trees), ""
        if protected.replicas is not None:
            holders, prefix = list(protected.replicas), _prefix(protected.replicas[0])
        if holders[0] not in trees:
            raise CheckpointError(
                f"{info.path} holds nothing of which rank {holders[0]} is the first holder",
                hint="resume stages of a pipeline on the mesh that they were saved on",
            )
        records = [json.loads(trees[rank]) for rank in holders if rank in trees]
        tensors = protected.prepare_whole(*records)
        into = {prefix + name: tensor for name, tensor in tensors.items()}
        loaded = store.load(info, into, verify=False)
        # A rank that the saved job did not have begins with the first holder's local state.
        payload = loaded.rank_payload(self._runner.rank) or loaded.rank_payload(holders[0])
        if payload is None:
            raise CheckpointError(f"{info.path} holds no local state of any rank")
        return payload

    def _choose(self, store: CheckpointStore) -> CheckpointInfo | None:
        choice: list[Any] = [None]
        if self._runner.rank == 0:
            info, skipped = store.newest_valid()
            for each in skipped:
                self._notify(Report(event=each.to_record()))
                text = f"skipped the checkpoint {each.path}: {each.reason}"
                self._notify(Note(key=f"skipped-{each.path}", level="warning", text=text))
            choice = [None if info is None else str(info.path)]
        if self._runner.world_size > 1:
            dist.broadcast_object_list(choice, 0)
        if choice[0] is None:
            return None
        return store.info(choice[0])


def _prefix(owner: int) -> str:
    """Return what tells apart names that several parts may have, by their first holder."""
    return f"part{owner}."
