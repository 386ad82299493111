"""Datasets as sources of samples: who they are, what enters the module, what passes through.

Each kind of dataset knows the digests of its samples in the cheapest way that is safe. Where
none is, every sample is read and hashed at each run, and `how` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from trainonce.errors import DataError
from trainonce.graph.digest import digest
from trainonce.graph.features.dataset import FeatureRows
from trainonce.graph.features.hugging_face import hugging_face
from trainonce.graph.features.items import ReadSource, image_folder, is_folder, keyed
from trainonce.graph.features.samples import array_digests, derived
from trainonce.graph.features.selection import Call, Selection, as_tensors
from trainonce.graph.features.source import Source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.source import Lineage


def open_source(
    dataset: Any,
    selection: Selection,
    folder: Path,
    *,
    sample_key: Callable[[int], object] | None = None,
) -> Source:
    """Return the source for any supported dataset.

    Args:
        dataset: Tensors, arrays, a map-style dataset, a Hugging Face dataset, rows.
        selection: What enters the module.
        folder: Where digests and labels are kept between runs.
        sample_key: Names sample `i`, as the method of that name of a dataset does.

    Raises:
        DataError: It has no length or no items.
    """
    if sample_key is not None:
        return keyed(dataset, selection, folder, sample_key)
    if isinstance(dataset, FeatureRows):
        return _ChainSource(dataset, selection)
    if isinstance(dataset, Subset):
        base = open_source(dataset.dataset, selection, folder)
        return _SubsetSource(base, np.asarray(dataset.indices, np.int64))
    if isinstance(dataset, ConcatDataset):
        return _ConcatSource([open_source(part, selection, folder) for part in dataset.datasets])
    fields = _fields(dataset)
    if fields is not None and not callable(selection.inputs):
        return _ArraySource(fields, selection, isinstance(dataset, (torch.Tensor, np.ndarray)))
    if type(dataset).__module__.startswith("datasets.") and hasattr(dataset, "column_names"):
        return hugging_face(dataset, selection, folder)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{type(dataset).__qualname__} has no length or no items, so its samples have no names",
            hint="give a map-style dataset, tensors or arrays",
        )
    if callable(getattr(dataset, "sample_key", None)):
        return keyed(dataset, selection, folder, dataset.sample_key)
    if is_folder(dataset):
        return image_folder(dataset, selection, folder)
    return ReadSource(dataset, selection, "it declares no sample_key(i)")


# ---------------------------------------------------------------- tensors and arrays


def _fields(dataset: Any) -> dict[Any, torch.Tensor] | None:
    """Return the columns of a dataset that is nothing but tensors or arrays."""
    if type(dataset) is TensorDataset:
        return dict(enumerate(dataset.tensors))
    if isinstance(dataset, (torch.Tensor, np.ndarray)):
        dataset = (dataset,)
    if isinstance(dataset, Mapping):
        items = dict(dataset)
    elif isinstance(dataset, tuple):
        items = dict(enumerate(dataset))
    else:
        return None
    if not items or not all(isinstance(v, (torch.Tensor, np.ndarray)) for v in items.values()):
        return None
    tensors = {key: _shared(value) for key, value in items.items()}
    lengths = {len(value) if value.ndim else -1 for value in tensors.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise DataError(f"arrays of a dataset have different lengths: {sorted(lengths)}")
    return tensors


def _shared(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(value if value.flags.writeable else np.array(value))


class _ArraySource(Source):
    how = "samples are known by the content of their tensors"

    def __init__(self, fields: dict[Any, torch.Tensor], selection: Selection, alone: bool) -> None:
        super().__init__(len(next(iter(fields.values()))), selection)
        self._fields = fields
        self._alone = alone

    def _sample(self, index: Any) -> Any:
        if self._alone:
            return self._fields[0][index]
        if 0 in self._fields:
            return tuple(tensor[index] for tensor in self._fields.values())
        return {key: tensor[index] for key, tensor in self._fields.items()}

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        call, _ = self.selection.split(self._sample(slice(None)))
        return array_digests(call.parts())

    def call(self, index: int, variant: int | None) -> Call:
        return self.selection.split(self._sample(index))[0]

    def rest(self, index: int) -> Any:
        return self.selection.split(self._sample(index))[1]

    def rests(self, indices: NDArray[np.int64]) -> Any:
        sample = self._sample(slice(None))
        rest = None if self._alone else self.selection.rest(sample)
        places = torch.from_numpy(indices)
        if isinstance(rest, dict):
            return {key: tensor[places] for key, tensor in rest.items()}
        return None if rest is None else tuple(tensor[places] for tensor in rest)


# ---------------------------------------------------------------- parts, unions, chains


class _SubsetSource(Source):
    def __init__(self, base: Source, indices: NDArray[np.int64]) -> None:
        super().__init__(len(indices), base.selection)
        self.how = base.how
        self._base = base
        self._indices = indices

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        return self._base.digests(variant)[self._indices]

    def lineage(self, variant: int | None) -> list[Lineage]:
        return self._base.lineage(variant)

    def release(self) -> None:
        self._base.release()

    def call(self, index: int, variant: int | None) -> Call:
        return self._base.call(int(self._indices[index]), variant)

    def rest(self, index: int) -> Any:
        return self._base.rest(int(self._indices[index]))

    def rests(self, indices: NDArray[np.int64]) -> Any:
        return self._base.rests(self._indices[indices])


class _ConcatSource(Source):
    def __init__(self, parts: Sequence[Source]) -> None:
        super().__init__(sum(part.num_samples for part in parts), parts[0].selection)
        self.how = "; ".join(dict.fromkeys(part.how for part in parts))
        self._parts = parts
        self._ends = np.cumsum([part.num_samples for part in parts])

    def _place(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self._parts[number], index - start

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        return np.concatenate([part.digests(variant) for part in self._parts])

    def lineage(self, variant: int | None) -> list[Lineage]:
        return [pairs for part in self._parts for pairs in part.lineage(variant)]

    def release(self) -> None:
        for part in self._parts:
            part.release()

    def call(self, index: int, variant: int | None) -> Call:
        part, place = self._place(index)
        return part.call(place, variant)

    def rest(self, index: int) -> Any:
        part, place = self._place(index)
        return part.rest(place)


class _ChainSource(Source):
    """Rows of one module that enter the next: known by what they were computed from."""

    def __init__(self, rows: Any, selection: Selection) -> None:
        super().__init__(len(rows), selection)
        self.how = "samples are rows, known by their subgraph and sample"
        self._rows = rows

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        inputs = self.selection.inputs
        chosen = "" if inputs is None else digest(inputs)
        return derived(self._rows.digests, f"chain:{self._rows.fingerprint.digest}:{chosen}")

    def lineage(self, variant: int | None) -> list[Lineage]:
        return [(self.digests(variant), self._rows.digests)]

    def call(self, index: int, variant: int | None) -> Call:
        return as_tensors(self.selection.split(self._rows[index])[0])

    def rest(self, index: int) -> Any:
        return self.selection.split(self._rows[index])[1]

    def rests(self, indices: NDArray[np.int64]) -> Any:
        found = self._rows.collate(self._rows.__getitems__(indices.tolist()))
        if self.selection.inputs is None and not isinstance(found, tuple):
            return None
        return found if callable(self.selection.inputs) else self.selection.rest(found)
