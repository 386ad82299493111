"""Types that are stored as plainer values: what they become, and how they are made again.

Known by name, so that no library is imported for being looked for. What is listed here is
compared with its digest when it is encoded, so that a form that loses something is refused.
"""

from __future__ import annotations

import fractions
import importlib
import uuid
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any

import numpy as np

from trainonce.graph.packages import module_name

if TYPE_CHECKING:
    from collections.abc import Callable

_LIBRARIES = frozenset({"torch", "pyarrow", "pandas"})
_FACTORIES = {cls.__name__: cls for cls in (list, dict, set, int, float, str, bool, tuple)}

# Class name -> (to plain, from plain).
FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}


def class_name(cls: type) -> str:
    """Return the name under which the store keeps objects of a class."""
    separator = "." if cls.__module__.partition(".")[0] in _LIBRARIES else ":"
    return f"{module_name(cls.__module__)}{separator}{cls.__qualname__}"


def register_codec(
    cls: type, to_plain: Callable[[Any], object], from_plain: Callable[[Any], object]
) -> None:
    """Teach the store to keep objects of exactly `cls`.

    Args:
        cls: The type; `digest.register` teaches its digest.
        to_plain: Returns storable values that determine the object.
        from_plain: Builds the object from them. Registered code runs on what the store holds,
            so it must not trust it.
    """
    FORMS[class_name(cls)] = (to_plain, from_plain)


# ---------------------------------------------------------------- the standard library, NumPy


def _default_dict(value: defaultdict[Any, Any]) -> object:
    factory: Any = value.default_factory
    # Another factory has no name to be found by: the comparison of digests refuses it.
    name = getattr(factory, "__name__", "") if factory in _FACTORIES.values() else ""
    return [name, dict(value)]


def _make_default_dict(plain: Any) -> object:
    return defaultdict(_FACTORIES.get(plain[0]), plain[1])


register_codec(Counter, dict, Counter)
register_codec(defaultdict, _default_dict, _make_default_dict)
register_codec(deque, lambda v: [v.maxlen, list(v)], lambda p: deque(p[1], p[0]))
register_codec(range, lambda v: [v.start, v.stop, v.step], lambda p: range(*p))
register_codec(slice, lambda v: [v.start, v.stop, v.step], lambda p: slice(*p))
register_codec(
    fractions.Fraction,
    lambda v: [v.numerator, v.denominator],
    lambda p: fractions.Fraction(*p),
)
register_codec(uuid.UUID, lambda v: v.hex, uuid.UUID)
register_codec(
    np.ma.MaskedArray,
    lambda v: [np.asarray(v.data), np.ma.getmaskarray(v), v.fill_value],
    lambda p: np.ma.MaskedArray(p[0], p[1], fill_value=p[2]),
)


# ---------------------------------------------------------------- torch, frames, datasets


def _dtype_of(name: Any) -> object:
    import torch

    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else None


def _size_of(dims: Any) -> object:
    import torch

    return torch.Size(dims)


def _device_of(name: Any) -> object:
    import torch

    return torch.device(name)


def _series(value: Any) -> object:
    return [value.name, value.to_frame(name="values")]


def _make_series(plain: Any) -> object:
    return plain[1]["values"].rename(plain[0])


def _make_polars(table: Any) -> object:
    return importlib.import_module("polars").from_arrow(table)


def _dataset(value: Any) -> object:
    indices = None if value._indices is None else value._indices.table
    split = None if value.split is None else str(value.split)
    return [value.data.table, indices, split, dict(value.format)]


def _make_dataset(plain: Any) -> object:
    datasets = importlib.import_module("datasets")
    table, indices, split, how = plain
    made = datasets.Dataset(
        datasets.table.InMemoryTable(table),
        split=None if split is None else datasets.Split(split),
        indices_table=None if indices is None else datasets.table.InMemoryTable(indices),
    )
    if how["type"] is None:
        return made
    settings = {"columns": how["columns"], "output_all_columns": how["output_all_columns"]}
    return made.with_format(how["type"], **settings, **how["format_kwargs"])


FORMS["torch.dtype"] = (lambda v: str(v).removeprefix("torch."), _dtype_of)
FORMS["torch.device"] = (str, _device_of)
FORMS["torch.Size"] = (list, _size_of)
for _module in ("pandas", "pandas.core.series"):
    FORMS[f"{_module}.Series"] = (_series, _make_series)
FORMS["polars.dataframe.frame:DataFrame"] = (lambda v: v.rechunk().to_arrow(), _make_polars)
FORMS["datasets.arrow_dataset:Dataset"] = (_dataset, _make_dataset)
