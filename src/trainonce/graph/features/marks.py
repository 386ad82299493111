"""Tensors that know which samples their rows are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.errors import DataError
from trainonce.graph.features.samples import array_digests, derived

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

# Methods after which a tensor still holds the same rows.
_KEEPING = frozenset(
    {
        torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.pin_memory,
        torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.clone,
    }
)  # fmt: skip
_DATA: Any = torch.Tensor.data
# What hands out the memory, so that writes to it leave no trace.
_EXPOSING = frozenset(
    {
        torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__,
        _DATA.__get__, torch.Tensor.untyped_storage, torch.Tensor.data_ptr,
    }
)  # fmt: skip


class Memory:
    """What all marked views of one piece of memory share: whether it was handed out."""

    exposed = False


class RowTensor(torch.Tensor):
    """A batch that knows which samples its rows are, and keeps that through moves and copies.

    It no longer does once it was changed in place, or may have been: `version` is torch's count
    of changes when it was marked, None where torch does not count (inference mode).
    """

    rows: NDArray[np.bytes_]
    version: int | None
    memory: Memory

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator on plain tensors; mark its result again where rows are the same."""
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func in _EXPOSING and isinstance(source, RowTensor):
            source.memory.exposed = True
        if func in _KEEPING and isinstance(source, RowTensor) and isinstance(found, torch.Tensor):
            if found.dtype == source.dtype and found.shape == source.shape and is_intact(source):
                return mark(found, source.rows, source.memory if _share(found, source) else None)
        return unmarked(found)


def mark(tensor: torch.Tensor, rows: NDArray[np.bytes_], memory: Memory | None = None) -> RowTensor:
    """Return `tensor` as one that knows the digests of its rows; the storage is shared."""
    with torch._C.DisableTorchFunctionSubclass():
        marked = tensor.as_subclass(RowTensor)
    marked.rows, marked.version, marked.memory = rows, _changes_of(marked), memory or Memory()
    return marked


def is_intact(marked: RowTensor) -> bool:
    """Tell whether a marked tensor still holds the rows that it was marked with."""
    if marked.memory.exposed:
        return False
    if marked.version is None:
        # Nothing counts changes here. What lies in memory can be named by content instead.
        return marked.device.type != "cpu"
    return marked.version == _changes_of(marked)


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are views of the same memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _changes_of(tensor: torch.Tensor) -> int | None:
    """Return torch's count of changes in place, which all views share."""
    with torch._C.DisableTorchFunctionSubclass():
        return None if tensor.is_inference() else tensor._version


def unmarked(value: Any) -> Any:
    """Return a marked tensor as a plain one; anything else as it is."""
    if not isinstance(value, RowTensor):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def unmark_all(value: Any) -> Any:
    """Return nested arguments with their marked tensors as plain ones."""
    if isinstance(value, dict):
        return {key: unmark_all(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(unmark_all(item) for item in value)
    return unmarked(value)


def names_of(tensors: list[Any]) -> tuple[NDArray[np.bytes_], list[NDArray[np.bytes_]]]:
    """Return a digest for each row of the inputs that a prefix reads.

    Also those that it was made from, where several inputs make a row.
    """
    found: list[NDArray[np.bytes_]] = []
    for tensor in tensors:
        if isinstance(tensor, RowTensor) and is_intact(tensor):
            found.append(tensor.rows)
        elif tensor.device.type == "cpu":
            found.append(array_digests([("0", unmarked(tensor))]))
        else:
            raise DataError(
                f"an input of shape {tuple(tensor.shape)} on {tensor.device} is not marked with "
                "its rows, or was changed since, so they cannot be looked up",
                hint="move the batch as the memoized loader yields it (x.to(device)), and "
                "transform it afterwards inside the model; or call model.module(...)",
            )
    if len(found) == 1:
        return found[0], []
    joined = [b"".join(parts) for parts in zip(*(rows.tolist() for rows in found), strict=True)]
    lengths = {len(rows) for rows in found}
    assert len(lengths) == 1
    return derived(
        np.array([name.ljust(16, b"\0")[:16] for name in joined], "S16"), "joined"
    ), found
