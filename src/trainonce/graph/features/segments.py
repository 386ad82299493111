"""Segment files: some rows of one subgraph, with the digests that name them.

A segment is written once, to a temporary name, synced, and renamed; it never changes
afterwards. It holds, in this order (format 1, little endian)::

    magic "TROWSEG1" | u64 length of the JSON | u64 length of the file | 16 bytes XXH3-128
    JSON: format, subgraph, rows, columns (each with its offset)
    sample digests: 16 bytes a row
    checksums: u64 a row, XXH3-64 of the row's bytes seeded by its sample digest
    columns, each from a multiple of 64 KiB (of 2 MiB where it is longer than that): `stride`
    bytes a row
    heaps of ragged columns, each from a multiple of 64 KiB

The XXH3-128 covers the JSON, the digests and the checksums, so that a damaged table is
noticed when the segment is opened, and a damaged row when it is first read. The seed ties a
row to its sample: bytes of another row do not pass.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import xxhash

from trainonce.errors import StoreError
from trainonce.graph.encoders import tensor_bytes
from trainonce.graph.features.arena import HUGE_PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FORMAT = 1
DIGEST_BYTES = 16
_MAGIC = b"TROWSEG1"
_HEAD = struct.Struct("<8sQQ16s")
# Where columns begin. A multiple of every page size in use, so that they can be mapped.
_ALIGN = 1 << 16
# Longer rows are padded to whole pages, so that their segments can be mapped anywhere.
_LONG_ROW = 1 << 20
# A ragged row is a pointer into the segment's heap: byte offset, elements along dim 0.
_POINTER = np.dtype([("offset", "<i8"), ("length", "<i8")])


@dataclass(frozen=True)
class Column:
    """One output of the module, as it is stored.

    Args:
        name: Key of the output; "" where the module returns a single tensor.
        dtype: torch's name of it, without "torch.".
        shape: Of one row; of one element along dim 0 where ragged.
        ragged: Rows differ in their length along dim 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ragged: bool = False

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of a row, or of one element along dim 0 of a ragged row."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of what every row holds in place: its values, or a pointer to them."""
        return _POINTER.itemsize if self.ragged else self.item_bytes

    @cached_property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        if self.row_bytes < _LONG_ROW:
            return max(1, self.row_bytes)
        return -(-self.row_bytes // 4096) * 4096


@dataclass(frozen=True)
class Rows:
    """Rows in memory, on their way into a segment.

    Args:
        digests: Sample digests, "S16", one a row.
        columns: How the values are laid out.
        values: For each column a CPU tensor of shape (rows, *shape), or, where ragged, a
            list of tensors of shape (length, *shape).
    """

    digests: NDArray[np.bytes_]
    columns: tuple[Column, ...]
    values: tuple[torch.Tensor | list[torch.Tensor], ...]

    def __len__(self) -> int:
        return len(self.digests)

    def chosen(self, places: NDArray[np.int64]) -> Rows:
        """Return some of the rows."""
        picked = torch.from_numpy(places)
        return Rows(
            self.digests[places],
            self.columns,
            tuple(
                value[picked]
                if isinstance(value, torch.Tensor)
                else [value[place] for place in places.tolist()]
                for value in self.values
            ),
        )


@dataclass(frozen=True)
class Header:
    """What a segment says about itself."""

    subgraph: str
    num_rows: int
    columns: tuple[Column, ...]
    offsets: tuple[int, ...]
    heaps: tuple[tuple[int, int], ...]
    digests: NDArray[np.bytes_]
    checksums: NDArray[np.uint64]


def as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Return a CPU tensor's elements as bytes, row-major; a view where it is contiguous."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    return np.frombuffer(tensor_bytes(tensor), np.uint8)


def row_checksum(digest: bytes, pieces: Sequence[NDArray[np.uint8]]) -> int:
    """Return the checksum of one row: of all its bytes, seeded by its sample's digest."""
    seed = int.from_bytes(digest.ljust(DIGEST_BYTES, b"\0")[:8], "little")
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0].data, seed=seed)
    hasher = xxhash.xxh3_64(seed=seed)
    for piece in pieces:
        hasher.update(piece.data)
    return hasher.intdigest()


def write_segment(file: BinaryIO, subgraph: str, rows: Rows) -> None:
    """Write one segment to an empty file, and sync it."""
    fixed: list[NDArray[np.uint8]] = []
    heaps: list[list[NDArray[np.uint8]]] = []
    for column, values in zip(rows.columns, rows.values, strict=True):
        if isinstance(values, torch.Tensor):
            fixed.append(as_bytes(values).reshape(len(rows), column.row_bytes))
            heaps.append([])
        else:
            pieces = [as_bytes(value) for value in values]
            lengths = [int(value.shape[0]) for value in values]
            fixed.append(_pointers(pieces, lengths))
            heaps.append(pieces)
    checksums = np.fromiter(
        (
            row_checksum(
                rows.digests[row],
                [*(part[row] for part in fixed), *(heap[row] for heap in heaps if heap)],
            )
            for row in range(len(rows))
        ),
        np.uint64,
        len(rows),
    )
    heap_bytes = [sum(piece.nbytes for piece in heap) for heap in heaps]
    head, offsets, heap_offsets, size = _layout(subgraph, rows, heap_bytes)
    tables = head + rows.digests.tobytes() + checksums.tobytes()
    file.write(_HEAD.pack(_MAGIC, len(head), size, xxhash.xxh3_128_digest(tables)))
    file.write(tables)
    for column, part, offset in zip(rows.columns, fixed, offsets, strict=True):
        _write_column(file, part, offset, column.stride)
    for heap, offset in zip(heaps, heap_offsets, strict=True):
        file.seek(offset)
        for piece in heap:
            file.write(piece.data)
    file.truncate(size)
    file.flush()
    os.fsync(file.fileno())


def read_header(fd: int, subgraph: str) -> Header | None:
    """Return a segment's tables, or None where they are damaged or of another subgraph.

    Raises:
        StoreError: A newer version of this package wrote it.
    """
    raw = os.pread(fd, _HEAD.size, 0)
    if len(raw) < _HEAD.size:
        return None
    magic, json_bytes, size, expected = _HEAD.unpack(raw)
    if magic[:7] == _MAGIC[:7] and magic != _MAGIC:
        raise StoreError(
            f"a segment of rows has format {magic!r}; this version reads {_MAGIC!r}",
            hint="a newer trainonce wrote this store: upgrade, or use another TRAINONCE_STORE",
        )
    if magic != _MAGIC or os.fstat(fd).st_size != size or json_bytes > size:
        return None
    head = os.pread(fd, json_bytes, _HEAD.size)
    try:
        fields: dict[str, Any] = json.loads(head)
        num_rows = int(fields["rows"])
        table_bytes = num_rows * (DIGEST_BYTES + 8)
        tables = os.pread(fd, table_bytes, _HEAD.size + json_bytes)
        if xxhash.xxh3_128_digest(head + tables) != expected or fields["subgraph"] != subgraph:
            return None
        columns = tuple(
            Column(
                str(c["name"]),
                str(c["dtype"]),
                tuple(int(size) for size in c["shape"]),
                bool(c["ragged"]),
            )
            for c in fields["columns"]
        )
        offsets = tuple(int(c["offset"]) for c in fields["columns"])
        heaps = tuple((int(c["heap"]), int(c["heap_bytes"])) for c in fields["columns"])
    except (ValueError, KeyError, TypeError):
        return None
    if not _plausible(columns, offsets, heaps, num_rows, size):
        return None
    digests = np.frombuffer(tables, f"S{DIGEST_BYTES}", num_rows)
    checksums = np.frombuffer(tables, np.uint64, num_rows, num_rows * DIGEST_BYTES)
    return Header(subgraph, num_rows, columns, offsets, heaps, digests, checksums)


def pointer(cell: NDArray[np.uint8]) -> tuple[int, int]:
    """Return where a ragged row lies: byte offset in the heap, and length along dim 0."""
    offset, length = cell.view(_POINTER)[0].item()
    return offset, length


def _pointers(pieces: list[NDArray[np.uint8]], lengths: list[int]) -> NDArray[np.uint8]:
    cells = np.zeros(len(pieces), _POINTER)
    sizes = np.array([piece.nbytes for piece in pieces], np.int64)
    cells["offset"] = np.cumsum(sizes) - sizes
    cells["length"] = lengths
    return cells.view(np.uint8).reshape(len(pieces), _POINTER.itemsize)


def _layout(
    subgraph: str, rows: Rows, heap_bytes: list[int]
) -> tuple[bytes, list[int], list[int], int]:
    """Return the JSON, the offsets of columns and heaps, and the file's size."""
    # The offsets stand in the JSON, whose length moves them: room is left for their digits.
    table_bytes = len(rows) * (DIGEST_BYTES + 8)
    position = _aligned(_HEAD.size + 4096 + 1024 * len(rows.columns) + table_bytes)
    offsets: list[int] = []
    heap_offsets: list[int] = []
    for column in rows.columns:
        # Long columns start where huge pages do: a hole in the file, which takes no disk.
        if len(rows) * column.stride >= HUGE_PAGE:
            position = -(-position // HUGE_PAGE) * HUGE_PAGE
        offsets.append(position)
        position = _aligned(position + len(rows) * column.stride)
    for size in heap_bytes:
        heap_offsets.append(position)
        position = _aligned(position + size)
    fields = {
        "format": FORMAT,
        "subgraph": subgraph,
        "rows": len(rows),
        "columns": [
            {
                "name": column.name,
                "dtype": column.dtype,
                "shape": column.shape,
                "ragged": column.ragged,
                "offset": offset,
                "heap": heap,
                "heap_bytes": size,
            }
            for column, offset, heap, size in zip(
                rows.columns, offsets, heap_offsets, heap_bytes, strict=True
            )
        ],
    }
    head = json.dumps(fields).encode()
    if _HEAD.size + len(head) + table_bytes > offsets[0]:
        raise StoreError(f"the outputs' names are too long for a segment: {len(head)} bytes")
    return head, offsets, heap_offsets, position


def _plausible(
    columns: Sequence[Column],
    offsets: Sequence[int],
    heaps: Sequence[tuple[int, int]],
    num_rows: int,
    size: int,
) -> bool:
    """Tell whether every column lies within the file: a shared store is not trusted."""
    ends = [heap + length for heap, length in heaps]
    for column, offset in zip(columns, offsets, strict=True):
        if not isinstance(getattr(torch, column.dtype, None), torch.dtype):
            return False
        if any(dim < 0 for dim in column.shape):
            return False
        ends.append(offset + num_rows * column.stride)
    starts = [*offsets, *(heap for heap, _ in heaps)]
    return (
        all(start > 0 and start % _ALIGN == 0 for start in starts)
        and all(length >= 0 for _, length in heaps)
        and all(end <= size for end in ends)
    )


def _aligned(position: int) -> int:
    return -(-position // _ALIGN) * _ALIGN


def _write_column(file: BinaryIO, part: NDArray[np.uint8], offset: int, stride: int) -> None:
    file.seek(offset)
    if part.shape[1] == stride:
        file.write(np.ascontiguousarray(part).data)
        return
    for row, values in enumerate(part):
        file.seek(offset + row * stride)
        file.write(values.data)
