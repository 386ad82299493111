"""What scripts change of modules beside their tensors: modes, what is frozen, plain attributes.

`batch_norm.eval()` from some epoch on, `requires_grad_(True)` when a backbone is unfrozen, a rate
or a temperature that a schedule sets: none of it is in a `state_dict`, and a process that takes a
rank over leaves out the iterations in which it was done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

_PLAIN = (bool, int, float, str, type(None))


class Modes:
    """Flags and plain attributes of modules, as far as they change from now on.

    Args:
        modules: By name.
        parameters: By name.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, torch.nn.Module]],
        parameters: Iterable[tuple[str, torch.Tensor]],
    ) -> None:
        self._attributes = {
            f"{name}.{key}": (vars(module), key)
            for name, module in modules
            for key, value in vars(module).items()
            if key == "training" or (_is_the_users(module, key) and type(value) in _PLAIN)
        }
        self._places = list(self._attributes.values())
        self._parameters = dict(parameters)
        self._first = self._now()
        self._last = self._first
        self._changed: set[str] = set()
        self._loaded: Mapping[str, Any] = {}

    def _now(self) -> list[Any]:
        attributes = [values.get(key) for values, key in self._places]
        return attributes + [each.requires_grad for each in self._parameters.values()]

    def read(self) -> dict[str, Any]:
        """Return those that have changed since the beginning, with their present values."""
        now = self._now()  # in every step
        if now == self._last and not self._changed:
            return {}
        self._last = now
        names = (*self._attributes, *self._parameters)
        values = dict(zip(names, now, strict=True))
        first = dict(zip(names, self._first, strict=True))
        self._changed.update(name for name in names if values[name] != first[name])
        return {name: values[name] for name in self._changed if type(values[name]) in _PLAIN}

    def load(self, values: Mapping[str, Any]) -> None:
        """Take over what `read` returned in another process; all others are as at the beginning."""
        self._loaded = values
        names = (*self._attributes, *self._parameters)
        wanted = {**dict(zip(names, self._first, strict=True)), **values}
        self._changed.update(name for name in values if name in wanted)
        for name, (present, key) in self._attributes.items():
            if present.get(key) != wanted[name]:
                present[key] = wanted[name]
        for name, parameter in self._parameters.items():
            if parameter.requires_grad != wanted[name]:
                parameter.requires_grad_(wanted[name])

    def return_to_commit(self) -> None:
        """Undo what code between steps did on its way to the last commit."""
        self.load(self._loaded)


def _is_the_users(module: torch.nn.Module, key: str) -> bool:
    return not key.startswith("_") and type(module).__module__.partition(".")[0] != "torch"
