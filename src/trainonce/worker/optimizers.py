"""What optimizers keep for each parameter, by names that are the same on every rank.

A name is "optimizer/index/key": the name that the optimizer was registered under, the place of
the parameter among its parameters, and the key in the parameter's state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainonce.worker.copies import copy_tree
from trainonce.worker.shards import keeps_a_part, owned_by, restore_split, state_of
from trainonce.worker.torch_private import local_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

# The parameters themselves, and names that torch keeps beside them.
_NOT_VALUES = ("params", "param_names")


class _Place(NamedTuple):
    """Where an entry of the state is."""

    optimizer: torch.optim.Optimizer
    parameter: torch.Tensor
    key: str


class OptimizerStates:
    """The state of the registered optimizers.

    Args:
        optimizers: By name; may grow until the first use.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        # State of a rehearsal: its memory is mapped, which takes longer than to fill it.
        self._warm: dict[torch.Tensor, dict[str, Any]] = {}
        self._settled: dict[str, int] = {}

    def _entries(self) -> Iterator[tuple[str, Any]]:
        for name, optimizer in self._optimizers.items():
            for index, parameter in enumerate(_parameters_of(optimizer)):
                # Not sorted: a newcomer takes over the order too, for state_dict() shows it.
                for key, value in state_of(optimizer).get(parameter, {}).items():
                    yield f"{name}/{index}/{key}", value

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors, live."""
        return ((n, value) for n, value in self._entries() if isinstance(value, torch.Tensor))

    def scalars(self) -> dict[str, Any]:
        """Return everything that is no tensor, live."""
        return {n: value for n, value in self._entries() if not isinstance(value, torch.Tensor)}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Take over what `scalars` returned elsewhere, as far as it is kept here."""
        is_kept = self.kept_here()
        for name, value in scalars.items():
            place = self._find(name)
            if place is not None and is_kept(name):
                state_of(place.optimizer)[place.parameter][place.key] = value

    def slot(
        self,
        name: str,
        dtype: torch.dtype,
        shape: list[int],
        device: str,
        split: dict[str, Any] | None,
        strides: list[int] | None,
    ) -> torch.Tensor | None:
        """Return this rank's part of a tensor to receive into, made if it is missing.

        Args:
            name: Of the tensor.
            dtype: Of its elements.
            shape: Of this rank's part.
            device: Type of the device that it is on elsewhere.
            split: How it is split between ranks, from `describe_split`.
            strides: Of this rank's part, None if contiguous: fused optimizers go by memory.

        Returns:
            None if there is no such optimizer or parameter.
        """
        place = self._find(name)
        if place is None:
            return None
        state = state_of(place.optimizer)[place.parameter]
        warm = self._warm.get(place.parameter, {}).pop(place.key, None)
        present = state.get(place.key, warm)
        local = None if present is None else local_of(present)
        if local is None or (local.dtype, *_form(local)) != (dtype, shape, strides):
            where = place.parameter.device if device != "cpu" else torch.device("cpu")
            if strides is None:
                local = torch.empty(shape, dtype=dtype, device=where)
            else:
                local = torch.empty_strided(shape, strides, dtype=dtype, device=where)
            present = restore_split(local, split, place.parameter)
        state[place.key] = present
        return local

    def drop_others(self, kept: Collection[str]) -> None:
        """Remove the state of parameters of which `kept` names nothing; keep its memory."""
        named = {name.rpartition("/")[0] for name in kept}
        for name, optimizer in self._optimizers.items():
            for index, parameter in enumerate(_parameters_of(optimizer)):
                if f"{name}/{index}" not in named:
                    self._warm[parameter] = state_of(optimizer).pop(parameter, {})

    # ------------------------------------------------------------------ whose it is

    def parameter_of(self, name: str) -> torch.Tensor | None:
        """Return the parameter that state of this name belongs to."""
        place = self._find(name)
        return None if place is None else place.parameter

    def kept_here(self) -> Callable[[str], bool]:
        """Return what tells of a name whether this rank keeps a tensor or scalar of that name."""
        owned = {name: owned_by(optimizer) for name, optimizer in self._optimizers.items()}

        def is_kept(name: str) -> bool:
            mine = owned.get(_owner_of(name))
            return mine is None or self.parameter_of(name) in mine

        return is_kept

    @property
    def keeps_a_part(self) -> bool:
        """Whether an optimizer splits its state between ranks by itself."""
        return any(map(keeps_a_part, self._optimizers.values()))

    def own_names(self) -> set[str]:
        """Return the names of the tensors that no other rank has a part or a copy of."""
        alone = {name for name, each in self._optimizers.items() if keeps_a_part(each)}
        return {name for name, _ in self.tensors() if _owner_of(name) in alone}

    def _find(self, name: str) -> _Place | None:
        optimizer = self._optimizers.get(_owner_of(name))
        if optimizer is None:
            return None
        _, number, key = name.rsplit("/", 2)
        index = int(number)
        for group in optimizer.param_groups:
            if index < len(group["params"]):
                return _Place(optimizer, group["params"][index], key)
            index -= len(group["params"])
        return None

    # ------------------------------------------------------------------ parameter groups

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """Return a copy of the values of all parameter groups: learning rates and the like."""
        return {
            name: [
                {key: copy_tree(value) for key, value in group.items() if key not in _NOT_VALUES}
                for group in optimizer.param_groups
            ]
            for name, optimizer in self._optimizers.items()
        }

    def load_groups(self, groups: dict[str, list[dict[str, Any]]]) -> None:
        """Take over what `groups` returned, for the optimizers that are in it."""
        for name, found in groups.items():
            for group, values in zip(self._optimizers[name].param_groups, found, strict=True):
                group.update(copy_tree(values))

    def settle(self) -> None:
        """Take note of the groups that the set-up makes; others are added on the way."""
        self._settled = {name: len(each.param_groups) for name, each in self._optimizers.items()}

    def added_groups(
        self, names: Mapping[torch.Tensor, str], groups: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[list[str]]]:
        """Return whose parameters the groups hold that were added since the set-up.

        Args:
            names: Of all parameters.
            groups: What `groups` returned at the commit: what was added since is left out.
        """
        return {
            name: [[names.get(each, "") for each in group["params"]] for group in added]
            for name, present in groups.items()
            if (added := self._optimizers[name].param_groups[self._settled[name] : len(present)])
        }

    def add_groups(
        self, added: Mapping[str, list[list[str]]], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        """Add what `added_groups` returned elsewhere, as far as it is not here.

        Until `let_groups_be_added`, a group of these is passed over when the script adds it again.
        """
        for name, groups in added.items():
            optimizer = self._optimizers[name]
            for members in groups[len(optimizer.param_groups) - self._settled[name] :]:
                known = [parameters[each] for each in members if each in parameters]
                optimizer.add_param_group({"params": known})
            vars(optimizer)["add_param_group"] = _adding_once(optimizer)

    def let_groups_be_added(self) -> None:
        """Undo what `add_groups` did to the method that adds groups."""
        for optimizer in self._optimizers.values():
            vars(optimizer).pop("add_param_group", None)


def _adding_once(optimizer: torch.optim.Optimizer) -> Any:
    def add_param_group(param_group: dict[str, Any]) -> None:
        wanted = param_group["params"]
        members = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
        known = set(_parameters_of(optimizer))
        if not known.issuperset(members):
            type(optimizer).add_param_group(optimizer, {**param_group, "params": members})

    return add_param_group


def _owner_of(name: str) -> str:
    """Return the optimizer in the name of its state; empty for another name."""
    return name.rsplit("/", 2)[0] if name.count("/") >= 2 else ""


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def strides_of(tensor: torch.Tensor) -> list[int] | None:
    """Return the strides of a tensor, None if it is contiguous."""
    return None if tensor.is_contiguous() else list(tensor.stride())


def _form(tensor: torch.Tensor) -> tuple[list[int], list[int] | None]:
    return list(tensor.shape), strides_of(tensor)
