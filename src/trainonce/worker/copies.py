"""Copies of trees of containers, tensors and plain values."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch


def assign_tree(present: Any, wanted: Any) -> Any:
    """Return a tree equal to `wanted`, made of the dicts and lists of `present` where it can be."""
    if type(present) is dict and type(wanted) is dict:
        found = {key: assign_tree(present.get(key), each) for key, each in wanted.items()}
        present.clear()
        present.update(found)
        return present
    if type(present) is list and type(wanted) is list:
        present[:] = [
            assign_tree(*pair) for pair in itertools.zip_longest(present[: len(wanted)], wanted)
        ]
        return present
    return wanted


def copy_tree(value: Any) -> Any:
    """Copy containers and tensors; share everything else, which is immutable."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) is dict:
        return {key: copy_tree(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copy_tree(each) for each in value)
    if isinstance(value, dict | list | set):
        copied = value.copy()
        if isinstance(copied, dict):
            for key, each in copied.items():
                copied[key] = copy_tree(each)
        return copied
    return value
