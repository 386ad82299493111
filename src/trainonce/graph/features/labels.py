"""What passes through beside the features, kept so that no sample is read for its label.

A sample's rest (a label, a name, a weight) is flattened into columns and stored as rows under
the sample's key, with the same guarantees as features. Only plain values can be kept: numbers,
strings, tensors and arrays of one shape. Anything else is read from the dataset when needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.graph.features.segments import Column, Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trainonce.graph.features.rows import RowTable

# Stored where a sample has no rest: a table needs a column.
_NOTHING = Column("nothing", "bool", ())


def encode(digests: NDArray[np.bytes_], rests: Sequence[Any]) -> Rows | None:
    """Return the rests as rows, or None where they cannot be kept."""
    flat = [_flatten(rest) for rest in rests]
    if any(leaves is None or leaves.keys() != (flat[0] or {}).keys() for leaves in flat):
        return None
    columns: list[Column] = []
    values: list[torch.Tensor | list[torch.Tensor]] = []
    for name in flat[0] or ():
        tensors = [leaves[name] for leaves in flat if leaves is not None]
        if name.endswith(":str"):
            columns.append(Column(name, "uint8", (), ragged=True))
            values.append(tensors)
        elif all(tensor.shape == tensors[0].shape for tensor in tensors):
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            columns.append(Column(name, dtype, tuple(tensors[0].shape)))
            values.append(torch.stack(tensors))
        else:
            return None
    if not columns:
        columns, values = [_NOTHING], [torch.zeros(len(rests), dtype=torch.bool)]
    return Rows(digests, tuple(columns), tuple(values))


class Labels:
    """The rests of some samples, in memory, in their order.

    Args:
        table: Where they are stored.
        slots: One for each sample.
    """

    def __init__(self, table: RowTable, slots: NDArray[np.int64]) -> None:
        self._names = [column.name for column in table.columns]
        self._values = table.take(slots)

    def rest(self, index: int) -> Any:
        """Return the rest of one sample, in the types it had."""
        return self._unflatten([value[index] for value in self._values], single=True)

    def rests(self, indices: NDArray[np.int64]) -> Any:
        """Return the rests of several samples, collated as `default_collate` does."""
        places = torch.from_numpy(indices)
        return self._unflatten(
            [
                value[places]
                if isinstance(value, torch.Tensor)
                else [value[index] for index in indices.tolist()]
                for value in self._values
            ],
            single=False,
        )

    def _unflatten(self, values: list[Any], *, single: bool) -> Any:
        out: dict[str, Any] = {}
        shape = ""
        for name, value in zip(self._names, values, strict=True):
            if name == _NOTHING.name:
                return None
            shape, key, kind = name.split(":")
            if kind == "str":
                pieces = [value] if single else value
                texts = [bytes(piece.numpy()).decode() for piece in pieces]
                out[key] = texts[0] if single else texts
            elif single and kind != "tensor":
                out[key] = value.numpy() if kind == "array" else value.item()
            else:
                out[key] = value
        if shape == "dict":
            return out
        return tuple(out.values())


def _flatten(rest: Any) -> dict[str, torch.Tensor] | None:
    """Return the leaves of a rest by "container:key:kind", or None where one is not plain."""
    if rest is None:
        return {}
    if isinstance(rest, Mapping):
        container, items = "dict", list(rest.items())
    elif isinstance(rest, tuple):
        container, items = "tuple", [(str(place), value) for place, value in enumerate(rest)]
    else:
        return None
    leaves: dict[str, torch.Tensor] = {}
    for key, value in items:
        leaf = _leaf(value)
        if leaf is None or not isinstance(key, str) or ":" in key:
            return None
        leaves[f"{container}:{key}:{leaf[0]}"] = leaf[1]
    return leaves


def _leaf(value: Any) -> tuple[str, torch.Tensor] | None:
    if isinstance(value, torch.Tensor):
        return "tensor", value.detach().cpu()
    if isinstance(value, np.ndarray):
        return None if value.dtype.kind not in "fiub" else ("array", torch.tensor(value))
    if isinstance(value, (bool, int, float, np.generic)):
        # Collated, Python's floats become float64 and its integers int64, as everywhere.
        kind = torch.float64 if isinstance(value, float) else None
        return "number", torch.as_tensor(value, dtype=kind)
    if isinstance(value, str):
        data = np.frombuffer(value.encode(), np.uint8).copy()
        return "str", torch.from_numpy(data)
    return None
