"""The row store: rows of features, found by (subgraph digest, sample digest).

Each subgraph has a folder of segment files (see `segments`). Nothing in it is ever changed
in place: rows arrive as whole segments, written aside, synced and renamed, so a process that
dies at any instant leaves either all rows of a segment or none. A row that is missing or
damaged is a miss; it is computed again into a new segment, and never read as zeros. Where
two segments hold the same sample, the one with the lower number, which came first, serves.

A store that cannot be written (full, read-only) still serves what it has; new rows then live
in anonymous memory for as long as the process does.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from trainonce.errors import StateMismatchError, StoreError
from trainonce.graph.features import segments
from trainonce.graph.features.arena import Arena, aligned_rows
from trainonce.graph.features.buffers import Buffers
from trainonce.graph.features.segments import Rows
from trainonce.graph.features.tables import forgotten

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.segments import Column, Header

_log = logging.getLogger(__name__)
_SUFFIX = ".rows"
# Addresses reserved at first, so that rows seldom move: they cost no memory.
_ROOM_SLOTS = 1 << 20
_ROOM_BYTES = 16 << 30
# Where numpy knows the dtype, a batch needs no reinterpretation.
_NUMPY_DTYPES = {
    torch.float16: "f2", torch.float32: "f4", torch.float64: "f8", torch.int64: "i8",
    torch.int32: "i4", torch.uint8: "u1", torch.bool: "?",
}  # fmt: skip


_Run: TypeAlias = "tuple[NDArray[np.bytes_], NDArray[np.int64]]"


@dataclass(frozen=True)
class _Segment:
    """One opened segment: where its rows begin, and its heaps.

    `fd` is open for segments in memory only: thousands of open files would be too many.
    """

    name: str
    header: Header
    slot: int
    heaps: tuple[NDArray[np.uint8] | None, ...]
    fd: int | None


class RowTable:
    """The rows of one subgraph. Threads of one process may share it for reading.

    Args:
        folder: Of this subgraph, within the store; made when the first rows are put.
        subgraph: The digest under which the rows were computed.
        verify: "first" checks each row at its first read in this process, "always" at each
            read.
        only: Take in this segment alone, for upkeep.

    Raises:
        StoreError: A newer version of the package wrote a segment.
    """

    def __init__(
        self, folder: Path, subgraph: str, *, verify: str = "first", only: str | None = None
    ) -> None:
        self.folder = folder
        self._only = only
        self.subgraph = subgraph
        self.verify = verify
        self.columns: tuple[Column, ...] = ()
        self.volatile_rows = 0
        self.damaged_rows = 0
        self.verify_s = 0.0
        self._names: set[str] = set()
        self._segments: list[_Segment] = []
        self._starts = np.empty(0, np.int64)
        self._num_slots = 0
        self._arenas: tuple[Arena, ...] = ()
        self._views: tuple[NDArray[np.uint8], ...] = ()
        self._typed: tuple[tuple[NDArray[Any] | None, Buffers | None, torch.dtype], ...] = ()
        # Sorted digests with their slots. New ones form runs of their own, which are merged as
        # they grow, so that adding rows never sorts all of them again.
        self._runs: list[_Run] = []
        self._verified = np.zeros(0, np.bool_)
        self._bad: set[int] = set()
        self._unverified_left = 0
        self._checking = threading.Lock()
        self.refresh()

    # ------------------------------------------------------------ finding

    def refresh(self) -> None:
        """Take in the segments that were committed since the last look."""
        try:
            names = sorted(entry for entry in os.listdir(self.folder) if entry.endswith(_SUFFIX))
            names = [name for name in names if self._only in (None, name)]
        except (FileNotFoundError, NotADirectoryError):
            return
        before = len(self._segments)
        for name in names:
            if name in self._names:
                continue
            self._names.add(name)
            try:
                fd = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            self._open(fd, name)
        self._index(self._segments[before:])

    def locate(self, digests: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Return the slot of each sample's row, or -1 where there is none.

        Args:
            digests: Sample digests, "S16", shape (n,).
        """
        found = np.full(len(digests), -1, np.int64)
        # Older runs first: of two rows of one sample the one that came first serves.
        for names, slots in self._runs:
            places = np.searchsorted(names, digests)
            places[places == len(names)] = 0
            found = np.where((found < 0) & (names[places] == digests), slots[places], found)
        return found

    # ------------------------------------------------------------ reading

    def damaged(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Check rows that are due to be checked; return the slots of damaged ones.

        Damaged rows are forgotten: the next `locate` finds another copy or none.
        """
        if self.verify == "always":
            due = np.unique(slots)
        elif self._unverified_left == 0:
            return slots[:0]
        else:
            due = np.unique(slots[~self._verified[slots]])
        if not len(due):
            return due
        with self._checking:
            started = time.perf_counter()
            numbers = np.searchsorted(self._starts, due, side="right") - 1
            bad = [
                slot
                for slot, number in zip(due.tolist(), numbers.tolist(), strict=True)
                if not self._intact(slot, self._segments[number])
            ]
            self._unverified_left -= int(np.count_nonzero(~self._verified[due]))
            self._verified[due] = True
            self.verify_s += time.perf_counter() - started
            if bad:
                _log.warning("%d stored rows are damaged and will be computed again", len(bad))
                self.damaged_rows += len(bad)
                self._forget(bad)
        return np.array(bad, np.int64)

    def take(self, slots: NDArray[np.int64]) -> tuple[torch.Tensor | list[torch.Tensor], ...]:
        """Return rows as new CPU tensors, one value a column.

        Args:
            slots: From `locate`, none of them -1, all of them checked by `damaged`.

        Returns:
            For each column one contiguous tensor of shape (n, *shape), or, where ragged, a
            list of n tensors of shape (length, *shape).
        """
        # "clip" never fires, slots come from `locate`; it spares numpy a buffered pass.
        taken: list[torch.Tensor | list[torch.Tensor]] = []
        for number, (typed, buffers, dtype) in enumerate(self._typed):
            if typed is None or buffers is None:
                taken.append(self._take_slowly(number, slots))
                continue
            batch = torch.from_numpy(typed.take(slots, 0, buffers.lend(len(slots)), "clip"))
            taken.append(batch if batch.dtype is dtype else batch.view(dtype))
        return tuple(taken)

    # ------------------------------------------------------------ writing

    def put(self, rows: Rows) -> bool:
        """Commit rows as one segment, synced to disk.

        Returns:
            True where they are on disk; False where the store could not be written and they
            are kept in memory only (the reason is logged once). Rows of samples that were
            forgotten on request are dropped.

        Raises:
            StateMismatchError: Their columns differ from those of the rows already here.
        """
        self._check_columns(rows.columns)
        gone = np.isin(rows.digests, forgotten(self.folder.parent))
        if gone.any():
            rows = rows.chosen(np.flatnonzero(~gone))
            if not len(rows):
                return True
        try:
            with self.lock():
                self.sweep()
                self._write(rows)
            self.refresh()
        except OSError as error:
            self._keep_in_memory(rows, error)
            return False
        return True

    # ------------------------------------------------------------ upkeep

    def sweep(self) -> int:
        """Remove what writers that died left behind, while the lock is held; return how many."""
        removed = 0
        for name in os.listdir(self.folder):
            if name.startswith(".tmp-"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.folder / name)
                    removed += 1
        return removed

    def digests_of(self, name: str) -> NDArray[np.bytes_]:
        """Return the sample digests in one segment; none where it cannot be read."""
        found = [one.header.digests for one in self._segments if one.name == name]
        return found[0] if found else np.empty(0, f"S{segments.DIGEST_BYTES}")

    def check_all(self, name: str) -> NDArray[np.bool_]:
        """Check every row of one segment; return which are intact."""
        (segment,) = [one for one in self._segments if one.name == name]
        slots = range(segment.slot, segment.slot + segment.header.num_rows)
        return np.array([self._intact(slot, segment) for slot in slots], np.bool_)

    def rewrite(self, name: str, keep: NDArray[np.bool_]) -> None:
        """Put a segment with some of its rows in the place of one.

        The new file has another name: whoever has the old one mapped keeps it as it was.
        """
        (segment,) = [one for one in self._segments if one.name == name]
        chosen = np.flatnonzero(keep)
        with self.lock():
            if len(chosen):
                values = self.take(segment.slot + chosen)
                rows = Rows(segment.header.digests[chosen], self.columns, values)
                self._write(rows, number=int(name.split("-")[0]))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / name)

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Hold this subgraph's lock, which the system releases when its holder dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    # ------------------------------------------------------------ inside

    def _open(self, fd: int, name: str, *, volatile: bool = False) -> None:
        """Take in one segment; its descriptor is ours from here."""
        try:
            header = segments.read_header(fd, self.subgraph)
            if header is None or (self.columns and header.columns != self.columns):
                _log.warning("segment %s is damaged or foreign; its rows count as missing", name)
                return
            if header.num_rows == 0:
                return
            self.columns = header.columns
            align = max(aligned_rows(column.stride, header.num_rows) for column in self.columns)
            slot = -(-self._num_slots // align) * align
            heaps = tuple(_map_heap(fd, offset, size) for offset, size in header.heaps)
            segment = _Segment(name, header, slot, heaps, os.dup(fd) if volatile else None)
            self._segments.append(segment)
            self._num_slots = slot + header.num_rows
            if not self._arenas or self._num_slots > self._arenas[0].num_slots:
                self._reserve()
            else:
                self._map(segment, fd)
        finally:
            os.close(fd)

    def _reserve(self) -> None:
        """Move all rows to addresses with room for more."""
        stride = max(column.stride for column in self.columns)
        num_slots = max(2 * self._num_slots, min(_ROOM_SLOTS, _ROOM_BYTES // stride))
        lost: list[int] = []
        # Old arenas live on while an array made from them does.
        self._arenas = tuple(Arena(column.stride, num_slots) for column in self.columns)
        for segment in self._segments:
            if segment.fd is not None:
                self._map(segment, segment.fd)
                continue
            try:
                fd = os.open(self.folder / segment.name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                lost.extend(range(segment.slot, segment.slot + segment.header.num_rows))
                continue
            try:
                self._map(segment, fd)
            finally:
                os.close(fd)
        self._views = tuple(arena.rows() for arena in self._arenas)
        self._typed = tuple(
            _typed_view(view, column)
            for view, column in zip(self._views, self.columns, strict=True)
        )

        if lost:
            self._forget(lost)

    def _map(self, segment: _Segment, fd: int) -> None:
        for arena, offset in zip(self._arenas, segment.header.offsets, strict=True):
            arena.map_rows(fd, offset=offset, slot=segment.slot, num_rows=segment.header.num_rows)

    def _index(self, new: Sequence[_Segment]) -> None:
        """Make the rows of new segments known to `locate`."""
        for segment in new:
            slots = segment.slot + np.arange(segment.header.num_rows)
            self._runs.append(_sorted_run(segment.header.digests, slots))
            while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
                newer, older = self._runs.pop(), self._runs.pop()
                self._runs.append(_merged([older, newer]))
        verified = np.zeros(self._num_slots, np.bool_)
        verified[: len(self._verified)] = self._verified
        self._verified = verified
        self._starts = np.array([segment.slot for segment in self._segments], np.int64)
        self._count_unverified()

    def _forget(self, bad: Iterable[int]) -> None:
        """Drop rows from the index, so that another copy, or none, is found."""
        self._bad.update(bad)
        gone = np.fromiter(self._bad, np.int64)
        self._runs = []
        for segment in self._segments:
            slots = segment.slot + np.arange(segment.header.num_rows)
            good = ~np.isin(slots, gone)
            self._runs.append(_sorted_run(segment.header.digests[good], slots[good]))
        self._runs = [_merged(self._runs)] if self._runs else []
        self._count_unverified()

    def _count_unverified(self) -> None:
        self._unverified_left = sum(
            int(np.count_nonzero(~self._verified[slots])) for _, slots in self._runs
        )

    def _segment_of(self, slot: int) -> _Segment:
        return self._segments[int(np.searchsorted(self._starts, slot, side="right")) - 1]

    def _intact(self, slot: int, segment: _Segment) -> bool:
        row = slot - segment.slot
        pieces = [
            view[slot, : column.row_bytes]
            for view, column in zip(self._views, self.columns, strict=True)
        ]
        for number, column in enumerate(self.columns):
            if column.ragged:
                piece = _heap_piece(segment, number, column, pieces[number])
                if piece is None:
                    return False
                pieces.append(piece)
        digest = bytes(segment.header.digests[row])
        return segments.row_checksum(digest, pieces) == int(segment.header.checksums[row])

    def _take_slowly(
        self, number: int, slots: NDArray[np.int64]
    ) -> torch.Tensor | list[torch.Tensor]:
        """Return rows that do not lie back to back: ragged or padded ones."""
        column, view = self.columns[number], self._views[number]
        taken: list[torch.Tensor] = []
        for slot in slots.tolist():
            piece: NDArray[np.uint8] | None = view[slot, : column.row_bytes]
            if column.ragged:
                piece = _heap_piece(self._segment_of(slot), number, column, piece)
            if piece is None:
                raise StoreError(f"row {slot} points outside of its segment")
            values = torch.empty(
                piece.nbytes // column.torch_dtype.itemsize, dtype=column.torch_dtype
            )
            if piece.nbytes:
                values.view(torch.uint8).numpy()[:] = piece
            taken.append(values.view(-1, *column.shape) if column.ragged else values)
        return taken if column.ragged else torch.stack(taken).view(len(slots), *column.shape)

    def _check_columns(self, columns: Sequence[Column]) -> None:
        if self.columns and tuple(columns) != self.columns:
            raise StateMismatchError(
                f"rows of this module were {self.columns}, and now are {tuple(columns)}",
                hint="an output whose length differs from row to row is declared with ragged=",
            )

    def _write(self, rows: Rows, number: int | None = None) -> None:
        """Write aside, sync, rename, sync the folder. The lock is held."""
        # While it is written, the file is locked: `_sweep` removes only what nobody holds.
        aside = self.folder / f".tmp-{secrets.token_hex(8)}"
        fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(fd, "wb") as file:
                segments.write_segment(file, self.subgraph, rows)
            numbers = [
                int(name.split("-")[0])
                for name in os.listdir(self.folder)
                if name.endswith(_SUFFIX) and name.split("-")[0].isdigit()
            ]
            if number is None:
                number = max(numbers, default=0) + 1
            os.rename(aside, self.folder / f"{number:010d}-{secrets.token_hex(4)}{_SUFFIX}")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise
        folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)

    def _keep_in_memory(self, rows: Rows, error: OSError) -> None:
        if not self.volatile_rows:
            _log.warning(
                "the row store %s cannot be written (%s): new rows are kept in memory only",
                self.folder, error,
            )  # fmt: skip
        self.volatile_rows += len(rows)
        fd = os.memfd_create("trainonce-rows", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as file:
            segments.write_segment(file, self.subgraph, rows)
        before = len(self._segments)
        self._open(fd, "in memory", volatile=True)
        self._index(self._segments[before:])


def _sorted_run(digests: NDArray[np.bytes_], slots: NDArray[np.int64]) -> _Run:
    """Return digests in order with their slots; of equal ones the first stays."""
    order = np.argsort(digests, kind="stable")
    digests, slots = digests[order], slots[order]
    first = np.ones(len(digests), np.bool_)
    first[1:] = digests[1:] != digests[:-1]
    return digests[first], slots[first]


def _merged(runs: Sequence[_Run]) -> _Run:
    """Return runs as one; of equal digests the one in the earlier run stays."""
    return _sorted_run(
        np.concatenate([names for names, _ in runs]), np.concatenate([slots for _, slots in runs])
    )


def _typed_view(
    view: NDArray[np.uint8], column: Column
) -> tuple[NDArray[Any] | None, Buffers | None, torch.dtype]:
    """Return the rows as an array of their own shape, buffers for batches, and the dtype.

    None where a batch is put together row by row: ragged and padded ones.
    """
    if column.ragged or column.row_bytes != column.stride:
        return None, None, column.torch_dtype
    dtype = np.dtype(f"u{column.torch_dtype.itemsize}")
    if column.torch_dtype in _NUMPY_DTYPES:
        dtype = np.dtype(_NUMPY_DTYPES[column.torch_dtype])
    typed = view.view(dtype).reshape(len(view), *column.shape)
    return typed, Buffers(dtype, column.shape), column.torch_dtype


def _map_heap(fd: int, offset: int, size: int) -> NDArray[np.uint8] | None:
    if size == 0:
        return None
    arena = Arena(1, size)
    arena.map_rows(fd, offset=offset, slot=0, num_rows=size)
    return arena.rows().reshape(-1)


def _heap_piece(
    segment: _Segment, number: int, column: Column, cell: NDArray[np.uint8]
) -> NDArray[np.uint8] | None:
    """Return the bytes a ragged row points to, or None where it points outside."""
    offset, length = segments.pointer(cell)
    size = length * column.item_bytes
    heap = segment.heaps[number]
    if size == 0:
        return np.empty(0, np.uint8)
    if heap is None or offset < 0 or length < 0 or offset + size > len(heap):
        return None
    return heap[offset : offset + size]
