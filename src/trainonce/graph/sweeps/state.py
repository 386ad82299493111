"""The state that passes from one segment of training to the next, whole or not at all.

It holds what the objects of a run say of themselves (`state_dict`, generators), what they do
not (gradients, modes, which parameters are frozen), and the global generators, so that a run that
is forked or taken up again goes on exactly as it would have.
"""

from __future__ import annotations

import contextlib
import copy
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.errors import StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Generator

_PLAIN = (bool, int, float, complex, str, bytes, type(None), list, tuple, dict, set, torch.Tensor,
          np.ndarray, np.generic)  # fmt: skip


def capture(objects: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the objects of a run and of the global generators, as plain values.

    Raises:
        StateMismatchError: An object says nothing of its state.
    """
    return {
        "objects": {name: _state_of(name, value) for name, value in objects.items()},
        "generators": generators(),
    }


def restore(objects: dict[str, Any], state: dict[str, Any]) -> None:
    """Bring the objects of a run, and the global generators, into a captured state.

    The state itself is left as it is: objects get copies.

    Raises:
        StateMismatchError: The objects are others than those that were captured.
    """
    kept = copy.deepcopy(state["objects"])
    if kept.keys() != objects.keys():
        raise StateMismatchError(
            f"a state of {sorted(kept)} does not fit what was built: {sorted(objects)}",
            hint="build the same objects, whatever the hyperparameters",
        )
    for name, value in objects.items():
        if not _load(value, kept[name]):
            objects[name] = kept[name]["value"]
    set_generators(state["generators"])


def generators() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": (kind, np.array(keys), *rest),
        "torch": torch.get_rng_state(),
        "cuda": list(cuda),
    }


def set_generators(states: dict[str, Any]) -> None:
    """Set the global generators."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextlib.contextmanager
def borrowed_generators() -> Generator[None]:
    """Seed the global generators with 0 for a block, and put them back after it."""
    before = generators()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        set_generators(before)


def _state_of(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, torch.Generator):
        return {"generator": value.get_state()}
    if isinstance(value, np.random.Generator):
        return {"numpy": value.bit_generator.state}
    if isinstance(value, random.Random):
        return {"python": value.getstate()}
    if isinstance(value, torch.nn.Module):
        return {
            "state": _copied(value.state_dict()),
            "gradients": {n: p.grad for n, p in value.named_parameters() if p.grad is not None},
            "frozen": [n for n, p in value.named_parameters() if not p.requires_grad],
            "training": [part.training for part in value.modules()],
        }
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return {"state": _copied(value.state_dict())}
    if isinstance(value, _PLAIN):
        return {"value": copy.deepcopy(value)}
    raise StateMismatchError(
        f"{name!r} is a {type(value).__qualname__}, which says nothing of its state",
        hint="give it state_dict() and load_state_dict(), or build it within the step",
    )


def _load(value: Any, kept: dict[str, Any]) -> bool:
    """Bring one object into its state; return False for a plain value, which is replaced."""
    if "value" in kept:
        return False
    if "generator" in kept:
        value.set_state(kept["generator"])
    elif "numpy" in kept:
        value.bit_generator.state = kept["numpy"]
    elif "python" in kept:
        value.setstate(kept["python"])
    else:
        value.load_state_dict(kept["state"])
        if isinstance(value, torch.nn.Module):
            _load_module(value, kept)
    return True


def _load_module(module: torch.nn.Module, kept: dict[str, Any]) -> None:
    frozen = set(kept["frozen"])
    for name, parameter in module.named_parameters():
        gradient = kept["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
        parameter.requires_grad_(name not in frozen)
    for part, training in zip(module.modules(), kept["training"], strict=True):
        part.training = training


def _copied(state: Any) -> dict[str, Any]:
    # Without the metadata of modules, and detached from what goes on training.
    return copy.deepcopy(dict(state))
