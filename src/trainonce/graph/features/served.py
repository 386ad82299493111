"""A cut model's rows: looked up by sample, computed where missing, committed by the segment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.graph.features.fingerprint import Versions, weights_digest
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.segments import Column, Rows
from trainonce.graph.features.upkeep import note_lineage, note_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.cut import Plan

_ROWS_PER_SEGMENT = 4096


class Served:
    """A plan with its rows."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.rehash = False
        name = plan.fingerprint.digest
        self._table = RowTable(folder / name[:40], name)
        self._state = plan.fingerprint.facts.state
        self._weights = dict(plan.fingerprint.parts)["weights"]
        self._versions = Versions(
            getattr(plan.prefix.get_submodule(owner), leaf)
            for owner, _, leaf in (path.rpartition(".") for path in self._state)
        )
        self._pending: list[Rows] = []
        self._origins: list[tuple[NDArray[np.bytes_], NDArray[np.bytes_]]] = []
        self._pending_names: set[bytes] = set()

    def note_origin(self, names: NDArray[np.bytes_], origin: NDArray[np.bytes_]) -> None:
        """Remember what rows were made from, until they are committed."""
        self._origins.append((names, origin))

    def stale(self) -> bool:
        """Tell whether frozen weights are no longer those that the rows were computed with."""
        if self._versions.changed() or self.rehash:
            self.rehash = False
            return self._weights_changed()
        return False

    def locate(self, names: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Return the slots of intact rows, -1 where a row is missing."""
        if self._pending_names and not self._pending_names.isdisjoint(names.tolist()):
            self.flush()
        while True:
            slots = self._table.locate(names)
            if not len(self._table.damaged(slots[slots >= 0])):
                return slots

    def take(self, slots: NDArray[np.int64], device: torch.device) -> dict[str, torch.Tensor]:
        """Return rows in the dtype in which the model computes them."""
        dtypes = self.plan.suffix.stored_dtypes()
        return {
            column.name: torch.as_tensor(value).to(device, dtypes[column.name], non_blocking=True)
            for column, value in zip(self._table.columns, self._table.take(slots), strict=True)
        }

    def compute(
        self,
        names: NDArray[np.bytes_],
        missing: NDArray[np.int64],
        plain: list[Any],
        storage_dtype: torch.dtype | None,
    ) -> dict[str, torch.Tensor]:
        """Compute some rows of a batch, and keep them to be committed."""
        # A single row is computed beside itself: kernels for one row may be others.
        wanted = missing if len(missing) > 1 else np.repeat(missing, 2)
        places = torch.from_numpy(wanted)
        flat = [
            value.index_select(0, places.to(value.device))
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(names)
            else value
            for value in plain
        ]
        with torch.no_grad():
            found = {key: value[: len(missing)] for key, value in self.plan.prefix(*flat).items()}
        kept = {
            key: value.to(storage_dtype)
            if storage_dtype is not None and value.is_floating_point()
            else value
            for key, value in found.items()
        }
        columns = tuple(
            Column(key, str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]))
            for key, value in kept.items()
        )
        chosen = names[missing]
        self._pending.append(Rows(chosen, columns, tuple(v.cpu() for v in kept.values())))
        self._pending_names.update(chosen.tolist())
        if len(self._pending_names) >= _ROWS_PER_SEGMENT:
            self.flush()
        # What the first epoch computes with is what later epochs will read.
        return {key: value.to(found[key].dtype) for key, value in kept.items()}

    def flush(self) -> None:
        """Commit pending rows as one segment.

        Weights that changed meanwhile without a trace (through `.data`) may have computed some
        of them, so they are dropped then.
        """
        origins, self._origins = self._origins, []
        if not self._pending:
            return
        if self._weights_changed():
            self._pending, self._pending_names = [], set()
            return
        names = np.concatenate([rows.digests for rows in self._pending])
        _, first = np.unique(names, return_index=True)
        values = tuple(
            torch.cat([rows.values[number] for rows in self._pending])[torch.from_numpy(first)]  # type: ignore[arg-type]
            for number in range(len(self._pending[0].columns))
        )
        rows = Rows(names[first], self._pending[0].columns, values)
        self._pending, self._pending_names = [], set()
        if origins:
            made, parents = (np.concatenate(part) for part in zip(*origins, strict=True))
            note_lineage(self._table.folder.parent, made, parents)
        self._table.put(rows)
        note_table(self._table.folder, "memoize", self.plan.fingerprint.parts)

    def _weights_changed(self) -> bool:
        return weights_digest(self.plan.prefix, self._state) != self._weights
