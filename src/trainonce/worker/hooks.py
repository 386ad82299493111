"""What communication hooks of DDP keep from step to step, such as PowerSGD's error feedback.

It differs by rank, and hooks change it until the last gradient is reduced: it is published
after the backward pass, when local state otherwise is published ahead of the last collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.errors import EncodingError
from trainonce.wire import encoding
from trainonce.worker import torch_private

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.nn.parallel import DistributedDataParallel

_GENERATORS = (np.random.RandomState, torch.Generator)


class HookStates:
    """The states that were registered with `DistributedDataParallel.register_comm_hook`.

    Of a state its attributes count that are plain values, tensors, containers of these, or
    generators of NumPy and torch; process groups and the like do not.

    Args:
        ddps: Whose hooks.
    """

    def __init__(self, ddps: Sequence[DistributedDataParallel]) -> None:
        self._ddps = ddps

    def __bool__(self) -> bool:
        return any(True for _ in self._states())

    def _states(self) -> Iterable[Any]:
        for ddp in self._ddps:
            for state in torch_private.hook_states(ddp):
                if next(iter(_attributes(state)), None) is not None:
                    yield state

    def read(self) -> list[dict[str, Any]]:
        """Return the attributes of each state, tensors live, in order of registration."""
        return [dict(_attributes(state)) for state in self._states()]

    def load(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Set what `read` returned in another process.

        Raises:
            ValueError: There are more states or fewer.
        """
        for state, attributes in zip(self._states(), values, strict=True):
            for name, value in attributes.items():
                here = getattr(state, name, None)
                if isinstance(here, _GENERATORS):
                    here.set_state(value)
                else:
                    setattr(state, name, value)


def _attributes(state: Any) -> Iterable[tuple[str, Any]]:
    slots = [name for each in type(state).__mro__ for name in getattr(each, "__slots__", ())]
    for name in dict.fromkeys((*getattr(state, "__dict__", ()), *slots)):
        value = getattr(state, name, None)
        if isinstance(value, _GENERATORS):
            value = value.get_state()
        try:
            encoding.flatten(value)
        except EncodingError:
            continue
        yield name, value
