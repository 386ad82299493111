"""A cut model's rows: looked up by sample, and computed where they are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.graph.features.fingerprint import Versions, weights_digest
from trainonce.graph.features.segments import Column, Rows
from trainonce.graph.features.shelf import shelf_of

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.cut import Plan


class Served:
    """A plan with its rows."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.rehash = False
        self.shelf = shelf_of(folder, plan.fingerprint.digest, plan.fingerprint.parts)
        self._state = plan.fingerprint.facts.state
        self._weights = dict(plan.fingerprint.parts)["weights"]
        self._versions = Versions(self._tensors)

    def _tensors(self) -> list[torch.Tensor]:
        paths = [path.rpartition(".") for path in self._state]
        return [getattr(self.plan.prefix.get_submodule(owner), leaf) for owner, _, leaf in paths]

    def stale(self) -> bool:
        """Tell whether frozen weights are no longer those that the rows were computed with."""
        if self._versions.changed() or self.rehash:
            self.rehash = False
            return self.weights_changed()
        return False

    def weights_changed(self) -> bool:
        """Tell whether the weights are no longer those of the prefix's digest."""
        return weights_digest(self.plan.prefix, self._state) != self._weights

    def take(self, slots: NDArray[np.int64], device: torch.device) -> dict[str, torch.Tensor]:
        """Return stored rows in the dtype in which the model computes them."""
        table = self.shelf.table
        taken = zip(table.columns, table.take(slots), strict=True)
        return self._as_computed({column.name: value for column, value in taken}, device)

    def make(
        self,
        names: NDArray[np.bytes_],
        missing: NDArray[np.int64],
        plain: list[Any],
        storage_dtype: torch.dtype | None,
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Return rows of a batch that are not stored, and how many had to be computed."""
        lacking = missing[self.shelf.lacks(names[missing])]
        fresh: dict[str, torch.Tensor] = {}
        if len(lacking):
            fresh = self._compute(names, lacking, plain, storage_dtype)
        if len(lacking) < len(missing):
            device = next(plain[place].device for place in self.plan.inputs)
            fresh = self._as_computed(self.shelf.recent(names[missing]), device)
        self.shelf.settle()
        return fresh, len(lacking)

    def _compute(
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
        values = tuple(value.cpu() for value in kept.values())
        self.shelf.add(self, Rows(names[missing], columns, values))
        # What the first epoch computes with is what later epochs will read.
        return {key: value.to(found[key].dtype) for key, value in kept.items()}

    def _as_computed(self, values: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
        dtypes = self.plan.suffix.stored_dtypes()
        return {
            name: torch.as_tensor(value).to(device, dtypes[name], non_blocking=True)
            for name, value in values.items()
        }
