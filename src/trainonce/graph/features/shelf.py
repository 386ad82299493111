"""The rows of one frozen prefix in this process: those stored, and those computed since.

Models that share a prefix (same graph, same weights) share its shelf, so that what one of them
computed in a batch serves the others in the same batch, before it is committed.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.segments import Rows
from trainonce.graph.features.upkeep import note_lineage, note_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_ROWS_PER_SEGMENT = 4096


class Maker(Protocol):
    """Who computed rows; they are committed only if its weights are still what names them."""

    def weights_changed(self) -> bool:
        """Tell whether the weights are no longer those of the prefix's digest."""
        ...


class Shelf:
    """Rows under one digest. Use `shelf_of`.

    Args:
        folder: Of the row store.
        name: The digest of the prefix.
        parts: What the digest is made of, for `trainonce graph`.
    """

    def __init__(self, folder: Path, name: str, parts: tuple[tuple[str, str], ...]) -> None:
        self._folder = folder
        self._parts = parts
        self.table = RowTable(folder / name[:40], name)
        self._pending: list[tuple[Maker, Rows]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._origins: list[tuple[NDArray[np.bytes_], NDArray[np.bytes_]]] = []

    def note_origin(self, names: NDArray[np.bytes_], origin: NDArray[np.bytes_]) -> None:
        """Remember what rows were made from, until they are committed."""
        self._origins.append((names, origin))

    def locate(self, names: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Return the slots of intact stored rows, -1 where a row is missing."""
        while True:
            slots = self.table.locate(names)
            if not len(self.table.damaged(slots[slots >= 0])):
                return slots

    def lacks(self, names: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Return which rows were not computed since the last commit, either."""
        return np.array([name not in self._places for name in names.tolist()], np.bool_)

    def add(self, maker: Maker, rows: Rows) -> None:
        """Keep rows to be committed."""
        number = len(self._pending)
        self._pending.append((maker, rows))
        self._places.update((name, (number, i)) for i, name in enumerate(rows.digests.tolist()))

    def recent(self, names: NDArray[np.bytes_]) -> dict[str, torch.Tensor]:
        """Return rows that were computed since the last commit: CPU tensors by column."""
        places = np.array([self._places[name] for name in names.tolist()], np.int64)
        found: dict[str, torch.Tensor] = {}
        for number in np.unique(places[:, 0]).tolist():
            rows = self._pending[number][1]
            here = torch.from_numpy(np.flatnonzero(places[:, 0] == number))
            wanted = torch.from_numpy(places[here.numpy(), 1])
            for column, values in zip(rows.columns, rows.values, strict=True):
                assert isinstance(values, torch.Tensor)
                if column.name not in found:
                    shape = (len(names), *values.shape[1:])
                    found[column.name] = torch.empty(shape, dtype=values.dtype)
                found[column.name][here] = values[wanted]
        return found

    def settle(self) -> None:
        """Commit what is pending, if that is enough for a segment."""
        if len(self._places) >= _ROWS_PER_SEGMENT:
            self.flush()

    def flush(self) -> None:
        """Commit pending rows as one segment.

        Weights that changed meanwhile without a trace (through `.data`) may have computed some
        of them, so what their owner computed is dropped then.
        """
        origins, self._origins = self._origins, []
        pending, self._pending, self._places = self._pending, [], {}
        changed = {id(maker): maker.weights_changed() for maker, _ in _distinct(pending)}
        parts = [rows for maker, rows in pending if not changed[id(maker)]]
        if not parts:
            return
        names = np.concatenate([rows.digests for rows in parts])
        _, first = np.unique(names, return_index=True)
        values = tuple(
            torch.cat([rows.values[number] for rows in parts])[torch.from_numpy(first)]  # type: ignore[arg-type]
            for number in range(len(parts[0].columns))
        )
        if origins:
            made, parents = (np.concatenate(part) for part in zip(*origins, strict=True))
            note_lineage(self._folder, made, parents)
        self.table.put(Rows(names[first], parts[0].columns, values))
        note_table(self.table.folder, "memoize", self._parts)


_shelves: weakref.WeakValueDictionary[tuple[str, str], Shelf] = weakref.WeakValueDictionary()


def shelf_of(folder: Path, name: str, parts: tuple[tuple[str, str], ...]) -> Shelf:
    """Return the shelf of a prefix, the same for all models of this process that share it."""
    key = (str(folder.absolute()), name)
    shelf = _shelves.get(key)
    if shelf is None:
        shelf = _shelves[key] = Shelf(folder, name, parts)
    return shelf


def _distinct(pending: list[tuple[Maker, Rows]]) -> list[tuple[Maker, Rows]]:
    return list({id(maker): (maker, rows) for maker, rows in pending}.values())
