"""A folder of checkpoints: staged, committed, found again, pruned.

::

    <folder>/step-000000120/               committed: a rename makes it appear, whole; one of
                                           the same step again is step-000000120.1
        manifest.json                      every other file, its size and checksum
        model.safetensors                  the model's tensors
        state.safetensors                  the other tensors
        model-00003.safetensors …          where state is split, what rank 3 alone writes
        tree-00003.bin …                   what rank 3 alone knows of its parts, encoded
        model.safetensors.index.json       which tensor is in which file
        tree.bin                           small replicated state, by wire.encoding
        rank-00000.bin …                   what each rank keeps to itself, opaque here
    <folder>/step-000000140.tmp-<nonce>/   staged: not a checkpoint yet, or never

What is being staged is locked by the process that will commit it, so what a dead process left
is told from work in progress, and removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.checkpoint import files, manifest, tensors
from trainonce.checkpoint.manifest import CheckpointInfo
from trainonce.clock import Clock, SystemClock
from trainonce.errors import CheckpointError
from trainonce.events import CheckpointSkipped

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import torch

_COMMITTED = re.compile(r"step-(\d{9,})(?:\.(\d+))?")
_STAGED = re.compile(r"step-(\d{9,})\.tmp-([\w.-]+)")
_DOOMED = re.compile(r"step-\d{9,}\.del-\w+")
_LOCK = ".lock"
_TREE = "tree.bin"
_POLL_S = 0.02
# A staged folder that nobody locked for so long has lost its writer before it began.
_ABANDONED_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What `CheckpointStore.load` found beside the tensors that it filled.

    Args:
        info: The checkpoint.
        tree: The small replicated state, as it was given to `write_replicated`.
    """

    info: CheckpointInfo
    tree: bytes

    def rank_payload(self, rank: int) -> bytes | None:
        """Return what `rank` kept to itself; None for a rank that the writing job had not."""
        path = self.info.path / _rank_file(rank)
        with files.explained("reading", path):
            return path.read_bytes() if rank < self.info.world_size else None

    def part_trees(self) -> dict[int, bytes]:
        """Return what ranks wrote beside parts that only they know, in order of rank."""
        names = {rank: _part_tree(rank) for rank in range(self.info.world_size)}
        with files.explained("reading", self.info.path):
            return {
                rank: (self.info.path / name).read_bytes()
                for rank, name in names.items()
                if name in self.info.files
            }


class CheckpointStore:
    """The checkpoints of one job in one folder.

    Several processes may use it at once, and may die at any time.

    Args:
        folder: Made when it is first written to.
        keep_last: How many sound checkpoints to keep.
        clock: What waiting and the time of creation go by.
    """

    def __init__(
        self, folder: Path | str, keep_last: int = 3, *, clock: Clock | None = None
    ) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}", hint="keep at least one")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.clock: Clock = clock or SystemClock()

    def begin(self, step: int, world_size: int, *, nonce: str | None = None) -> Staging:
        """Start a checkpoint of `step`.

        Args:
            step: Committed steps of the job.
            world_size: Number of ranks that will each write a payload.
            nonce: Ranks that write to the same checkpoint must give the same one, and each
                attempt another one: the generation and the step, say. Made up if None.

        Raises:
            CheckpointError: The folder cannot be made.
        """
        nonce = nonce or uuid.uuid4().hex[:12]
        path = self.folder / f"step-{step:09d}.tmp-{nonce}"
        if not _STAGED.fullmatch(path.name):
            raise CheckpointError(f"nonce {nonce!r} or step {step} does not fit a folder's name")
        with files.explained("making", path):
            path.mkdir(parents=True, exist_ok=True)
        return Staging(self, path, step, world_size)

    def newest_valid(
        self, *, full: bool = True
    ) -> tuple[CheckpointInfo | None, list[CheckpointSkipped]]:
        """Return the newest sound checkpoint, and what was passed over on the way to it.

        Args:
            full: Read every byte of a candidate. Otherwise compare names and sizes only.
        """
        skipped: list[CheckpointSkipped] = []
        for path in self._by_age():
            try:
                info = manifest.read(path)
                reason = info.damage(full=full)
            except CheckpointError as error:
                reason, info = error.message, None
            if reason is None:
                return info, [*self._unfinished(info), *skipped]
            skipped.append(CheckpointSkipped(path=str(path), reason=reason))
        return None, [*self._unfinished(None), *skipped]

    def info(self, path: Path | str) -> CheckpointInfo:
        """Return what the manifest of the checkpoint at `path` says.

        Raises:
            CheckpointError: It cannot be read.
        """
        return manifest.read(Path(path))

    def load(
        self,
        info: CheckpointInfo,
        into: Mapping[str, torch.Tensor] | None = None,
        *,
        verify: bool = True,
    ) -> Loaded:
        """Read the checkpoint `info`.

        Args:
            info: From `newest_valid`.
            into: Tensors to fill, by name, in place. Untouched if the checkpoint is damaged.
            verify: Read every byte first. Leave it out right after `newest_valid`.

        Raises:
            CheckpointError: It is damaged, or holds other names or shapes than `into`.
        """
        if verify and (reason := info.damage()) is not None:
            raise CheckpointError(
                f"{info.path} is damaged: {reason}", hint="take the one before: newest_valid()"
            )
        with files.explained("reading", info.path):
            if into:
                tensors.read_tensors(info.path, into)
            return Loaded(info=info, tree=(info.path / _TREE).read_bytes())

    def prune(self, *, trusted: Path | None = None) -> list[Path]:
        """Remove checkpoints beyond the last `keep_last`, and what dead writers left.

        Nothing is removed unless a checkpoint that stays has been read and found whole.

        Args:
            trusted: A checkpoint that was just written and read back; it stays.

        Returns:
            What was removed.
        """
        removed = [path for path in self._entries(_DOOMED) if self._remove(path)]
        removed += [path for path in self._entries(_STAGED) if self._remove_abandoned(path)]
        kept: list[Path] = []
        sound = trusted is not None
        for path in self._by_age():
            if len(kept) >= self.keep_last and sound:
                if path != trusted and self._remove(path):
                    removed.append(path)
            elif self._is_sound(path, full=not sound):
                kept.append(path)
                sound = True
        return removed

    # -------------------------------------------------------------------------- inside

    def _entries(self, pattern: re.Pattern[str]) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [path for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
        return []

    def _by_age(self) -> list[Path]:
        """Return the committed folders, newest first."""
        return sorted(self._entries(_COMMITTED), key=_age, reverse=True)

    def _unfinished(self, newest: CheckpointInfo | None) -> Iterator[CheckpointSkipped]:
        newest_step = -1 if newest is None else newest.step
        for path in sorted(self._entries(_STAGED), key=_age, reverse=True):
            if _age(path)[0] > newest_step:
                yield CheckpointSkipped(path=str(path), reason="it was never finished")

    def _is_sound(self, path: Path, *, full: bool) -> bool:
        try:
            return manifest.read(path).damage(full=full) is None
        except CheckpointError:
            return False

    def _remove_abandoned(self, path: Path) -> bool:
        """Remove a staged folder unless the process that will commit it lives."""
        try:
            descriptor = files.try_lock(path / _LOCK, create=False)
        except FileNotFoundError:
            with contextlib.suppress(FileNotFoundError):
                if self.clock.wall_s() - path.stat().st_mtime > _ABANDONED_S:
                    return self._remove(path)
            return False
        if descriptor is None:
            return False
        try:
            return self._remove(path)
        finally:
            os.close(descriptor)

    def _remove(self, path: Path) -> bool:
        """Remove a folder. It stops being a checkpoint at once, and not file by file."""
        doomed = path
        if not _DOOMED.fullmatch(path.name):
            doomed = path.with_name(f"step-{_age(path)[0]:09d}.del-{uuid.uuid4().hex}")
            try:
                path.rename(doomed)
            except OSError:  # another process was faster, or it is not ours to remove
                return False
        shutil.rmtree(doomed, ignore_errors=True)
        return True


class Staging:
    """A checkpoint in the making. Made by `CheckpointStore.begin`.

    Every rank calls `write_rank`. One of them also calls `write_replicated`, then `commit`,
    within a `with` block, which removes what was staged if an error comes in between.
    """

    def __init__(self, store: CheckpointStore, path: Path, step: int, world_size: int) -> None:
        self.path = path
        self.step = step
        self.world_size = world_size
        self._store = store
        self._lock: int | None = None
        self._rounded: dict[str, str] = {}

    def write_rank(self, rank: int, payload: bytes) -> None:
        """Write what `rank` keeps to itself.

        Raises:
            CheckpointError: It cannot be written, or the committing rank has given up.
        """
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"rank {rank} of {self.world_size} does not exist")
        path = self.path / _rank_file(rank)
        with files.explained("writing", path):
            files.write_whole(path, payload)

    def write_replicated(
        self,
        state: Mapping[str, torch.Tensor],
        tree: bytes,
        *,
        model_names: Collection[str] = (),
        storage_dtypes: Mapping[str, torch.dtype] | None = None,
        split: bool = False,
    ) -> None:
        """Write what all ranks have in common; called by the committing rank.

        Args:
            state: Name to tensor. Read until this returns.
            tree: Small state beside the tensors, encoded.
            model_names: Names in `state` that make up the model: they get a file of their
                own, which other tools can read.
            storage_dtypes: Name to a narrower dtype to store a floating-point tensor in. A
                resume from such a checkpoint is not exact, and the manifest says so.
            split: Other ranks write tensors too, with `write_part`.

        Raises:
            CheckpointError: It cannot be written.
        """
        self._take_lock()
        stored = self._narrow(state, storage_dtypes or {})
        with files.explained("writing", self.path):
            if stored:
                tensors.write_tensors(self.path, stored, model_names, split=split)
            (self.path / _TREE).write_bytes(tree)

    def write_part(
        self,
        rank: int,
        state: Mapping[str, torch.Tensor],
        tree: bytes = b"",
        *,
        model_names: Collection[str] = (),
        storage_dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Write what this rank alone writes; called by others than the committing rank.

        To be complete before `write_rank`, for which the committing rank waits.

        Args:
            rank: Who writes.
            state: Name to tensor, which no other rank writes; of a DTensor the local part is
                written.
            tree: What only this rank knows beside them, encoded.
            model_names: As for `write_replicated`.
            storage_dtypes: As for `write_replicated`.

        Raises:
            CheckpointError: It cannot be written.
        """
        stored = self._narrow(state, storage_dtypes or {})
        with files.explained("writing", self.path):
            if stored:
                tensors.write_tensors(self.path, stored, model_names, part=rank)
            if tree:
                files.write_whole(self.path / _part_tree(rank), tree)

    def _narrow(
        self, state: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, torch.Tensor]:
        narrow = {
            name: dtype
            for name, dtype in dtypes.items()
            if name in state and state[name].dtype != dtype and state[name].is_floating_point()
        }
        self._rounded = {name: str(state[name].dtype).removeprefix("torch.") for name in narrow}
        return {
            name: tensor.to(narrow[name]) if name in narrow else tensor
            for name, tensor in state.items()
        }

    def commit(
        self, *, timeout_s: float = 600.0, notes: dict[str, Any] | None = None
    ) -> CheckpointInfo:
        """Wait for all ranks, make it durable, make it a checkpoint, prune old ones.

        Args:
            timeout_s: How long ranks may take to write their payload.
            notes: Plain values to keep in the manifest.

        Raises:
            CheckpointError: A rank's payload is missing, or the disk refuses. What was staged
                is removed; earlier checkpoints are as they were.
        """
        with self:
            self._take_lock()
            self._wait_for_ranks(timeout_s)
            with files.explained("committing", self.path):
                info = self._finish(notes or {})
        self._store.prune(trusted=info.path)
        return info

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_rest: object) -> None:
        if error_type is None:
            self._release()
        else:
            self.discard()

    def discard(self) -> None:
        """Remove what was staged."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _take_lock(self) -> None:
        if self._lock is None:
            with files.explained("locking", self.path):
                self._lock = files.try_lock(self.path / _LOCK, create=True)
            if self._lock is None:
                raise CheckpointError(
                    f"another process is writing {self.path}",
                    hint="give each attempt a nonce of its own",
                )

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _wait_for_ranks(self, timeout_s: float) -> None:
        clock = self._store.clock
        deadline = clock.mono_s() + timeout_s
        while missing := [
            rank for rank in range(self.world_size) if not (self.path / _rank_file(rank)).exists()
        ]:
            if clock.mono_s() >= deadline:
                raise CheckpointError(
                    f"the checkpoint of step {self.step} lacks the state of ranks {missing} after "
                    f"{timeout_s:g} s",
                    hint="see what held them up, or raise timeout_s",
                )
            clock.sleep(_POLL_S)

    def _finish(self, notes: dict[str, Any]) -> CheckpointInfo:
        for leftover in self.path.glob(".*.part"):  # of a rank that died and was replaced
            leftover.unlink(missing_ok=True)
        content = sorted(path for path in self.path.iterdir() if path.name != _LOCK)
        info = CheckpointInfo(
            path=self.path,
            step=self.step,
            world_size=self.world_size,
            created_wall_s=self._store.clock.wall_s(),
            files={path.name: files.sync_and_digest(path) for path in content},
            rounded=self._rounded,
            notes=notes,
        )
        manifest.write(info)
        files.sync_folder(self.path)
        path = self._publish()
        files.sync_folder(self._store.folder)
        (path / _LOCK).unlink(missing_ok=True)  # locked until the descriptor is closed
        return dataclasses.replace(info, path=path)

    def _publish(self) -> Path:
        """Give the folder its name: the first free one, as a checkpoint is never replaced."""
        for attempt in itertools.count():
            suffix = f".{attempt}" if attempt else ""
            path = self._store.folder / f"step-{self.step:09d}{suffix}"
            try:
                self.path.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                return path
        raise AssertionError("unreachable")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.bin"


def _part_tree(rank: int) -> str:
    return f"tree-{rank:05d}.bin"


def _age(path: Path) -> tuple[int, int]:
    """Return (step, attempt) of a committed or staged folder."""
    match = _COMMITTED.match(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
