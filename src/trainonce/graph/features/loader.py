"""A loader whose batches know their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trainonce.errors import DataError
from trainonce.graph.features.marks import mark
from trainonce.graph.features.selection import Inputs, Selection
from trainonce.graph.features.sources import open_source

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class Epochs(Protocol):
    """What a loader tells about its epochs, and where rows are stored."""

    folder: Path

    def start_epoch(self) -> None:
        """An epoch begins."""
        ...

    def end_epoch(self) -> None:
        """An epoch is over."""
        ...


class MemoizedLoader:
    """A `DataLoader` whose batches know their rows; made by `memoize`."""

    def __init__(self, loader: Any, model: Epochs, inputs: Inputs) -> None:
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            raise DataError(
                f"a {type(loader).__qualname__} does not say which samples it yields",
                hint="give a DataLoader over a map-style dataset, with a batch size",
            )
        self.loader = loader
        self._model = model
        selection = Selection(inputs)
        if callable(inputs):
            raise DataError("memoize takes the names of inputs, not a function of the sample")
        self._fields = _field_digests(loader.dataset, selection, model.folder)
        self._indexed = _with_indices(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self._model.start_epoch()
        try:
            for indices, batch in self._indexed:
                yield self._marked(batch, np.asarray(indices, np.int64))
        finally:
            # Also where a loop stops early: what it computed is kept.
            self._model.end_epoch()

    def __getattr__(self, name: str) -> Any:
        # What else a loop may ask of a loader: dataset, batch_size, sampler.
        return getattr(self.__dict__["loader"], name)

    def _marked(self, batch: Any, indices: NDArray[np.int64]) -> Any:
        def item(key: Any, value: Any) -> Any:
            names = self._fields.get(key)
            if names is None or not isinstance(value, torch.Tensor) or len(value) != len(indices):
                return value
            return mark(value, names[indices])

        if isinstance(batch, torch.Tensor):
            return item(None, batch)
        if isinstance(batch, Mapping):
            return {key: item(key, value) for key, value in batch.items()}
        return type(batch)(item(place, value) for place, value in enumerate(batch))


def _field_digests(
    dataset: Any, selection: Selection, folder: Path
) -> dict[Any, NDArray[np.bytes_]]:
    """Return the digests of all samples, for each item that enters the model."""
    if selection.inputs is None:
        names = open_source(dataset, selection, folder).digests(None)
        # A sample that is no tuple is the batch itself; of a tuple it is the first item.
        return {None: names, 0: names}
    return {
        key: open_source(dataset, Selection(key), folder).digests(None) for key in selection.keys()
    }


class _Indexed(Dataset[Any]):
    """A dataset that returns each sample with its index."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._dataset[index]


class _CollateIndexed:
    """Collates indices apart from samples."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [index for index, _ in pairs], self._collate([sample for _, sample in pairs])


def _with_indices(loader: DataLoader[Any]) -> DataLoader[Any]:
    return DataLoader(
        _Indexed(loader.dataset),
        batch_sampler=loader.batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=_CollateIndexed(loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
