"""What of a sample enters the module, and what passes through beside its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from trainonce.errors import DataError

# A key of a tuple or dict sample, several of them, names of arguments, or a function.
Inputs: TypeAlias = (
    int | str | Sequence[int | str] | Mapping[str, int | str] | Callable[[Any], Any] | None
)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, for one sample or for a batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def parts(self) -> list[tuple[str, Any]]:
        """Return every argument with its place or name."""
        return [*((str(number), value) for number, value in enumerate(self.args)),
                *sorted(self.kwargs.items())]  # fmt: skip


class Selection:
    """Splits samples into the module's arguments and the rest.

    Args:
        inputs: None takes the first item of a tuple, or a whole sample that is no tuple; a
            key or position takes one item; a sequence takes several as positional arguments;
            a mapping takes items by argument name; a function of the sample returns the
            argument, or a tuple or dict of them, and leaves the whole sample as the rest.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def split(self, sample: Any) -> tuple[Call, Any]:
        """Return the arguments for one sample, and what passes through.

        Raises:
            DataError: The sample has no such items.
        """
        if self.inputs is None and not isinstance(sample, tuple):
            if isinstance(sample, (dict, list)):
                raise DataError(
                    f"samples are {type(sample).__name__}s: which item enters the module?",
                    hint='name it, for example features(..., inputs="image")',
                )
            return Call((sample,), {}), None
        if callable(self.inputs):
            return _as_call(self.inputs(sample)), sample
        items: Any = sample
        keys = self.keys()
        names = list(self.inputs) if isinstance(self.inputs, Mapping) else None
        try:
            taken = [items[key] for key in keys]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"a sample of type {type(sample).__name__} has no item {error}",
                hint=f"its items are {_items(sample)}; choose with inputs=",
            ) from error
        call = Call((), dict(zip(names, taken, strict=True))) if names else Call(tuple(taken), {})
        return call, self.rest(sample)

    def keys(self) -> list[int | str]:
        """Return the keys taken out of each sample; empty for a function."""
        if self.inputs is None:
            return [0]
        if isinstance(self.inputs, (int, str)):
            return [self.inputs]
        if isinstance(self.inputs, Mapping):
            return list(self.inputs.values())
        return [] if callable(self.inputs) else list(self.inputs)

    def rest(self, sample: Any) -> Any:
        """Return what passes through: the sample without what was taken."""
        keys = self.keys()
        if isinstance(sample, Mapping):
            return {key: value for key, value in sample.items() if key not in keys}
        if isinstance(sample, (tuple, list)):
            gone = {key % len(sample) for key in keys if isinstance(key, int)}
            return tuple(value for place, value in enumerate(sample) if place not in gone)
        return None

    def join(self, features: Any, rest: Any) -> Any:
        """Return a sample in which the features stand where the inputs stood."""
        if rest is None:
            return features
        if isinstance(rest, Mapping):
            named = features if isinstance(features, dict) else {"features": features}
            return {**rest, **named}
        place = 0
        if not callable(self.inputs):
            positions = [key for key in self.keys() if isinstance(key, int)]
            place = min((key % (len(rest) + len(positions)) for key in positions), default=0)
        return (*rest[:place], features, *rest[place:])


def _as_call(value: Any) -> Call:
    if isinstance(value, tuple):
        return Call(value, {})
    return Call((), value) if isinstance(value, dict) else Call((value,), {})


def _items(sample: Any) -> str:
    if isinstance(sample, Mapping):
        return ", ".join(repr(key) for key in sample)
    return f"0 to {len(sample) - 1}" if isinstance(sample, (tuple, list)) else "none"


def as_tensors(call: Call) -> Call:
    """Return the call with arrays and numbers as tensors, so that equal inputs are equal."""
    return Call(
        tuple(_tensor(value) for value in call.args),
        {name: _tensor(value) for name, value in call.kwargs.items()},
    )


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        # torch refuses to share what it may not write.
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, (bool, int, float, np.generic)):
        return torch.as_tensor(value)
    return value
