"""What levers need to know of a batch: how it enters a model, and how many samples it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from trainonce.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Of the caller: the loss or metric of (output, batch), and how much of each sample counts.
Loss = Callable[[Any, Any], torch.Tensor]
Count = Callable[[Any], torch.Tensor]


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """Return the model's output for a batch.

    A tensor is the input itself; of a tuple or list the first part is; of a dict, those
    entries are passed that the model's `forward` has parameters for, by name.

    Raises:
        ConfigError: The batch has no part that the model takes.
    """
    if isinstance(batch, Mapping):
        names = inspect.signature(unwrapped(model).forward).parameters
        given = {key: value for key, value in batch.items() if key in names}
        if not given:
            raise ConfigError(
                f"the model's forward takes {sorted(names)}, and a batch has {sorted(batch)}",
                hint="name the entry of a batch as the parameter, or give tuples (input, target)",
            )
        return model(**given)
    if isinstance(batch, tuple | list):
        return model(batch[0])
    return model(batch)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module within DDP, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the parts of a model in order of registration, lists of layers taken apart."""
    found: list[torch.nn.Module] = []
    for child in unwrapped(model).children():
        inside = isinstance(child, torch.nn.ModuleList | torch.nn.Sequential)
        found += list(child.children()) if inside else [child]
    return [block for block in found if next(block.parameters(), None) is not None]


def num_samples(batch: Any) -> int:
    """Return the length of dim 0 of the batch's first tensor.

    Raises:
        ConfigError: It has no tensor.
    """
    first = next(tensors(batch), None)
    if first is None or first.ndim == 0:
        raise ConfigError(
            "a batch has no tensor with samples in dim 0",
            hint="let the dataset, or the loader's collate_fn, give tensors",
        )
    return len(first)


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch in their order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for each in batch.values():
            yield from tensors(each)
    elif isinstance(batch, tuple | list):
        for each in cast("Sequence[Any]", batch):
            yield from tensors(each)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(each, device) for each in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(each, device) for each in cast("Sequence[Any]", batch))
    return batch


@dataclass(frozen=True, kw_only=True)
class Data:
    """Samples, and how to make batches of them.

    Args:
        dataset: Map-style.
        batch_size: Of all ranks together, as the caller asked for; None if not said.
        collate: Makes a batch of a list of samples.
        num_workers: Processes that load.
    """

    dataset: Any
    batch_size: int | None = None
    collate: Callable[[list[Any]], Any] = default_collate
    num_workers: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Iterable[int]) -> Any:
        """Return the batch of these samples."""
        return self.collate([self.dataset[index] for index in indices])

    def collate_indexed(self, samples: list[tuple[int, Any]]) -> tuple[torch.Tensor, Any]:
        """Return (indices, batch) of what `WithIndex` gives; a loader's `collate_fn`."""
        indices = torch.tensor([index for index, _ in samples])
        return indices, self.collate([sample for _, sample in samples])


def as_data(source: Any) -> Data:
    """Return the data in `source`: a map-style dataset, a `DataLoader` of one, or tensors.

    Of a `DataLoader` the dataset, batch size, collate function and number of processes count;
    the order is the run's own.

    Raises:
        DataError: It is none of these, or is empty.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, DataLoader):
        found = Data(
            dataset=_map_style(source.dataset),
            batch_size=source.batch_size,
            collate=source.collate_fn,
            num_workers=source.num_workers,
        )
    elif isinstance(source, tuple) and all(isinstance(each, torch.Tensor) for each in source):
        if len(lengths := {len(each) if each.ndim else 0 for each in source}) > 1:
            raise DataError(
                f"tensors of {sorted(lengths)} samples do not make one dataset",
                hint="give tensors with as many samples each, in dim 0",
            )
        found = Data(dataset=TensorDataset(*source))
    else:
        found = Data(dataset=_map_style(source))
    if not len(found):
        raise DataError("the dataset is empty", hint="check its path and filters")
    return found


def _map_style(dataset: Any) -> Any:
    good = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not good:
        raise DataError(
            f"{type(dataset).__name__} has no __len__ and __getitem__",
            hint="give a map-style dataset, a DataLoader of one, or a tuple of tensors",
        )
    return dataset
