"""Plain values: numbers, averages, texts, small tensors and arrays, and containers of these.

How large they are, and whether two are the same.
"""

from __future__ import annotations

import math
import operator
import sys
from collections import Counter, OrderedDict, defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from trainonce.worker.values import LazyMean

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_ELEMENTS = 64
_MOST_CHARACTERS = 4096
_NUMBERS = frozenset((bool, int, float, complex, type(None), LazyMean))
# As keys they are found again by identity only.
_BY_IDENTITY = frozenset((torch.Tensor, LazyMean))
# Of a `defaultdict`: those that have a name in the encoding.
_FACTORIES = (None, int, float, list, dict, set, str)
NOT_THE_USERS = ("trainonce", "torch", "runpy")

Measure: TypeAlias = "Callable[[Any, int], int]"
"""Takes a value and a limit, and returns of how many scalars the value consists.

-1 where it has parts that are not plain, `limit` + 1 where they are more than that.
"""


def number(_value: Any, _limit: int) -> int:
    """Measure a number."""
    return 1


def container(value: Any, limit: int) -> int:
    """Measure a container."""
    if len(value) > limit:
        return limit + 1
    kind, parts, total = type(value), value, 1
    if kind not in (list, tuple) and not _BY_IDENTITY.isdisjoint(map(type, value)):
        return -1
    if issubclass(kind, dict):
        if kind is defaultdict and value.default_factory not in _FACTORIES:
            return -1
        parts = chain.from_iterable(value.items())
    elif _NUMBERS.issuperset(map(type, value)):
        return 1 + len(value)
    for part in parts:
        size = measures[type(part)](part, limit - total)
        if size < 0:
            return -1
        total += size
        if total > limit:
            return limit + 1
    return total


def own_object(_value: Any, _limit: int) -> int:
    """Refuse to measure an object of a class of the user's own, which is looked into instead."""
    return -1


def not_plain(_value: Any, _limit: int) -> int:
    """Refuse to measure what is not plain."""
    return -1


def _text(value: str | bytes, _limit: int) -> int:
    return 1 if len(value) <= _MOST_CHARACTERS else -1


def _tensor(value: torch.Tensor, _limit: int) -> int:
    small = value.numel() <= _MOST_ELEMENTS and value.layout is torch.strided
    return 4 if small and value.device.type == "cpu" and not value.requires_grad else -1


def _array(value: np.ndarray, _limit: int) -> int:
    return 4 if value.size <= _MOST_ELEMENTS and value.dtype.kind in "biufc" else -1


class _Measures(dict[type, Measure]):
    """Type to measure; that of a type which is not listed is found out once."""

    def __missing__(self, kind: type) -> Measure:
        found: Measure = _array if issubclass(kind, np.generic) else not_plain
        if _is_of_the_user(kind.__module__) and "__dict__" in dir(kind):
            found = not_plain if hasattr(kind, "state_dict") else own_object
        return self.setdefault(kind, found)


measures = _Measures(
    {
        **dict.fromkeys(_NUMBERS, number),
        **dict.fromkeys((str, bytes), _text),
        **dict.fromkeys((list, tuple, dict, set, Counter, OrderedDict, defaultdict), container),
        torch.Tensor: _tensor,
        np.ndarray: _array,
    }
)


def _is_of_the_user(module: str) -> bool:
    """Tell whether a module is neither Python's own nor installed from a package."""
    top = module.partition(".")[0]
    if top in NOT_THE_USERS or top in sys.stdlib_module_names:
        return top == "__main__"
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def same(one: Any, other: Any) -> bool:
    """Tell whether two plain values are the same, one of them being a copy of before."""
    if one is other:  # neither changes: what can is kept as a copy
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if type(one) in (list, tuple):
        return len(one) == len(other) and (
            all(map(operator.is_, one, other)) or all(map(same, one, other))
        )
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if one == 0 and type(one) is float:
        return other == 0 and math.copysign(1, one) == math.copysign(1, other)
    return one == other
