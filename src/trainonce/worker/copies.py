"""Copies of trees of containers, tensors and plain values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from trainonce.worker.values import LazyMean

_IMMUTABLE = frozenset((type(None), bool, int, float, complex, str, bytes, LazyMean))


def assign_tree(present: Any, wanted: Any) -> Any:
    """Return a tree equal to `wanted`, made of the containers of `present` where it can be."""
    if isinstance(present, dict) and type(present) is type(wanted):
        found = {key: assign_tree(present.get(key), each) for key, each in wanted.items()}
        present.clear()
        present.update(found)
        return present
    if type(present) is set and type(wanted) is set:
        present.clear()
        present.update(wanted)
        return present
    if type(present) is list and type(wanted) is list:
        present[:] = [
            assign_tree(*pair) for pair in itertools.zip_longest(present[: len(wanted)], wanted)
        ]
        return present
    return wanted


def copy_tree(value: Any) -> Any:
    """Copy containers and tensors; share everything else, which is immutable."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list or kind is tuple:
        if _IMMUTABLE.issuperset(map(type, value)):
            return value[:]
        return kind(map(copy_tree, value))
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if kind is dict:
        return {key: copy_tree(each) for key, each in value.items()}
    if isinstance(value, dict | list | set):
        copied = value.copy()
        if isinstance(copied, dict):
            for key, each in copied.items():
                copied[key] = copy_tree(each)
        return copied
    return value
