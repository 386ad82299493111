"""Saving in the background: training stops for a copy, and not for the disk."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from trainonce.errors import CheckpointError
from trainonce.events import CheckpointSaved

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from trainonce.checkpoint.manifest import CheckpointInfo
    from trainonce.checkpoint.store import CheckpointStore


class AsyncSaver:
    """Writes checkpoints of a running job from a thread of its own.

    `save` copies the state into buffers that are kept from one time to the next, and returns.
    The copy takes as much memory as the state; `release` gives it back. The thread writes
    through system calls that do not hold the interpreter lock, so training goes on.

    `torch.distributed.checkpoint.async_save` is not used: it ends when the tensors are
    written, while here the payloads of other ranks, checksums, the rename and the pruning
    follow, in the same thread, and in one process group less.

    Args:
        store: Where to.
        timeout_s: How long to wait for the payloads of other ranks.
        on_saved: Called in the background thread with each checkpoint that was committed.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        timeout_s: float = 600.0,
        on_saved: Callable[[CheckpointSaved], None] | None = None,
    ) -> None:
        self.store = store
        self._timeout_s = timeout_s
        self._on_saved = on_saved
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._saved: CheckpointSaved | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        step: int,
        *,
        rank: int,
        world_size: int,
        nonce: str,
        rank_payload: bytes,
        state: Mapping[str, torch.Tensor] | None = None,
        part: Mapping[str, torch.Tensor] | None = None,
        tree: bytes = b"",
        split: bool = False,
        model_names: Collection[str] = (),
        storage_dtypes: Mapping[str, torch.dtype] | None = None,
        reason: str = "interval",
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Copy the state, and write it in the background.

        Every rank calls it. The one that passes `state` commits. Waits for the save before
        it, if that still runs.

        Args:
            step: Committed steps of the job.
            rank: This process's rank.
            world_size: Number of ranks.
            nonce: The same on all ranks, and another one at each attempt.
            rank_payload: What this rank keeps to itself.
            state: Name to tensor; None on the ranks that do not commit. May change as soon
                as this returns. Of a DTensor the local part is written.
            part: On the other ranks: tensors that are split, or that this rank writes alone.
            tree: Small replicated state, encoded; on the other ranks what belongs to `part`.
            split: As for `Staging.write_replicated`.
            model_names: As for `Staging.write_replicated`.
            storage_dtypes: As for `Staging.write_replicated`.
            reason: Why now, for the ledger.
            notes: Plain values to keep in the manifest.

        Raises:
            CheckpointError: The save before this one failed; this one was not begun.
        """
        begun_s = self.store.clock.mono_s()
        self.wait()
        self._saved = None
        mine = part if state is None else state
        staged = None if mine is None else self._stage(mine)
        blocked_s = self.store.clock.mono_s() - begun_s

        def write() -> None:
            try:
                staging = self.store.begin(step, world_size, nonce=nonce)
                if state is None or staged is None:
                    if staged or tree:
                        staging.write_part(
                            rank,
                            staged or {},
                            tree,
                            model_names=model_names,
                            storage_dtypes=storage_dtypes,
                        )
                    staging.write_rank(rank, rank_payload)
                    return
                begun_s = self.store.clock.mono_s()
                with staging:
                    staging.write_rank(rank, rank_payload)
                    staging.write_replicated(
                        staged, tree, model_names=model_names, storage_dtypes=storage_dtypes,
                        split=split,
                    )  # fmt: skip
                    info = staging.commit(timeout_s=self._timeout_s, notes=notes)
                self._report(info, blocked_s, begun_s, reason)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> CheckpointSaved | None:
        """Wait for the save that runs.

        Returns:
            What was committed last by this process; None if nothing was.

        Raises:
            CheckpointError: It failed. Told once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return self._saved
        if isinstance(error, CheckpointError):
            raise error
        raise CheckpointError(f"the checkpoint could not be written: {error}") from error

    def release(self) -> None:
        """Wait, and give the memory of the copy back."""
        self.wait()
        self._buffers.clear()

    def _stage(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        staged: dict[str, torch.Tensor] = {}
        devices: set[torch.device] = set()
        for name, tensor in state.items():
            local = tensor.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._buffers[name] = buffer.copy_(local, non_blocking=local.is_cuda)
            staged[name] = _like(tensor, buffer)
            if local.is_cuda:
                devices.add(local.device)
        for name in self._buffers.keys() - staged.keys():
            del self._buffers[name]
        for device in devices:
            torch.cuda.synchronize(device)
        return staged

    def _report(self, info: CheckpointInfo, blocked_s: float, begun_s: float, reason: str) -> None:
        clock = self.store.clock
        self._saved = CheckpointSaved(
            wall_s=clock.wall_s(),
            mono_s=clock.mono_s(),
            path=str(info.path),
            step=info.step,
            size_bytes=info.size_bytes,
            blocked_s=blocked_s,
            write_s=clock.mono_s() - begun_s,
            reason=reason,
        )
        if self._on_saved is not None:
            self._on_saved(self._saved)


def _like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return `local` as the same part of a whole as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def young_interval_s(cost_s: float, mtbf_s: float, *, write_s: float = 0.0) -> float:
    """Return the time between checkpoints that loses the least, seconds.

    The square root of 2 · cost · MTBF: J. W. Young, "A first order approximation to the
    optimum checkpoint interval", Communications of the ACM 17(9), 1974, pp. 530-531. Right
    as long as the cost is small against the MTBF.

    Args:
        cost_s: What one checkpoint takes from training: `CheckpointSaved.blocked_s` if it is
            written in the background.
        mtbf_s: Mean time between failures that only a checkpoint recovers from.
        write_s: How long writing takes in the background; the interval is no shorter, since
            one checkpoint has to end before the next.

    Raises:
        CheckpointError: A number is negative, or `mtbf_s` is 0.
    """
    if not (cost_s >= 0 and mtbf_s > 0 and write_s >= 0):
        raise CheckpointError(
            f"no interval for a cost of {cost_s} s, MTBF of {mtbf_s} s, writing of {write_s} s",
            hint="measure the cost once, and estimate an MTBF above 0",
        )
    return max(math.sqrt(2 * cost_s * mtbf_s), write_s)
