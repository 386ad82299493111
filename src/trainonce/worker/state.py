"""What must survive, and in which of three ways.

*Replicated* tensors (parameters, optimizer state, buffers that only the update changes) are
equal on all ranks between commits: a newcomer gets them from a donor. *Small* state
(`param_groups`, schedulers, scalers, anything with a `state_dict`) is replicated too, but
user code may change it between steps, so a copy is taken at every commit. *Local* buffers,
those that forward passes change, differ by rank and go to the mirror.

Of a tensor that is split between ranks (a DTensor) each rank keeps, gives and takes its local
part; `shards` tells which ranks hold the same one.
"""

from __future__ import annotations

import base64
import itertools
import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from trainonce.errors import ConfigError, StateError, StateMismatchError
from trainonce.wire import encoding
from trainonce.worker.hooks import HookStates
from trainonce.worker.shards import (
    describe_split,
    keeps_a_part,
    owned_by,
    restore_split,
    shard_key,
    split_text,
    state_of,
)
from trainonce.worker.torch_private import (
    local_of,
    shards_parameters,
    unreduced_gradients,
    version_of,
)
from trainonce.worker.transfer import Digest, as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Image:
    """A copy of replicated state, from before a change.

    Attributes:
        tensors: Names and copies.
        scalars: Optimizer state that is no tensor, by "optimizer/index/key".
    """

    tensors: Named
    scalars: dict[str, Any]


class Protected:
    """The registered state of one training process.

    Args:
        objects: Name to module, optimizer, object with `state_dict` and `load_state_dict`,
            or a list or dict of these.

    Raises:
        ConfigError: Something registered cannot be protected.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.stateful: dict[str, Any] = {}
        ddps: list[DistributedDataParallel] = []
        self.hooks = HookStates(ddps)
        for name, value in objects.items():
            self._register(name, value, ddps)
        self._parameters = _unique(
            (f"{name}.{key}", parameter)
            for name, module in self.modules.items()
            for key, parameter in module.named_parameters()
        )
        self._buffers = _unique(
            (f"{name}.{key}", buffer)
            for name, module in self.modules.items()
            for key, buffer in module.named_buffers()
        )
        self.replicas: tuple[int, ...] | None = None
        """Ranks that hold the same names and shapes; None for all."""
        self._local = _running_statistics(self.modules)
        # Read for every parameter in every step.
        split = any(local_of(tensor) is not tensor for _, tensor in self._parameters)
        self._version_of: Callable[[torch.Tensor], int] = (
            version_of if split else operator.attrgetter("_version")
        )
        self._sharding = [each for each in self.modules.values() if shards_parameters(each)]
        self._small: dict[str, Any] = {}
        self._parameter_versions = self._versions(self._parameters)
        self._old_gradients = self._gradients()
        self._buffer_versions = self._versions(self._buffers)
        self._kept_buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Optimizer state of a rehearsal: its memory is mapped, which takes longer than to fill it.
        self._warm: dict[torch.Tensor, dict[str, Any]] = {}

    def _register(self, name: str, value: Any, ddps: list[DistributedDataParallel]) -> None:
        if isinstance(value, DistributedDataParallel):
            self.modules[name] = value.module
            ddps.append(value)
        elif isinstance(value, torch.nn.Module):
            self.modules[name] = value
        elif isinstance(value, torch.optim.Optimizer):
            self.optimizers[name] = value
        elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            self.stateful[name] = value
        elif isinstance(value, Mapping):
            for key, each in value.items():
                self._register(f"{name}.{key}", each, ddps)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for index, each in enumerate(value):
                self._register(f"{name}.{index}", each, ddps)
        else:
            raise ConfigError(
                f"cannot protect {name}={type(value).__name__}: it has no state_dict and"
                " load_state_dict",
                hint="plain values belong in run.state",
            )

    # ------------------------------------------------------------------ what is there

    def layout(self) -> list[str]:
        """Return a line per registered tensor and object; equal on all ranks."""
        lines = [
            f"{name}: {str(t.dtype).removeprefix('torch.')}{split_text(t)}"
            for name, t in (*self._parameters, *self._buffers)
        ]
        lines += [f"{name}: {type(o).__name__}" for name, o in self.optimizers.items()]
        return lines + [f"{name}: {type(o).__name__}" for name, o in self.stateful.items()]

    def shard_key(self, rank: int) -> str:
        """Return what identifies the part of the state that this rank holds; empty for all."""
        tensors = (*self._parameters, *self._buffers)
        return shard_key(tensors, self.optimizers.values(), rank, self.replicas)

    def replicated(self) -> Named:
        """Return the replicated tensors, live, in the same order on every rank.

        Of split tensors the local part: replicated on the ranks with the same shard key.
        """
        shared = [(name, t) for name, t in self._buffers if name not in self._local]
        everything = (*self._parameters, *shared, *self._optimizer_tensors())
        return [(name, local_of(tensor)) for name, tensor in everything]

    def num_bytes(self) -> int:
        """Return the size of the replicated tensors."""
        return sum(t.numel() * t.element_size() for _, t in self.replicated())

    def parameters(self) -> Named:
        """Return the parameters of all registered modules, each once."""
        return list(self._parameters)

    def local_parameters(self) -> list[torch.Tensor]:
        """Return what this rank holds of each parameter."""
        return [local_of(parameter) for _, parameter in self._parameters]

    def _optimizer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, optimizer in self.optimizers.items():
            for index, parameter in enumerate(_parameters_of(optimizer)):
                # Not sorted: a newcomer takes over the order too, for state_dict() shows it.
                for key, value in state_of(optimizer).get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        yield f"{name}/{index}/{key}", value

    def _optimizer_scalars(self) -> dict[str, Any]:
        return {
            f"{name}/{index}/{key}": value
            for name, optimizer in self.optimizers.items()
            for index, parameter in enumerate(_parameters_of(optimizer))
            for key, value in state_of(optimizer).get(parameter, {}).items()
            if not isinstance(value, torch.Tensor)
        }

    # ------------------------------------------------------------------ watching for changes

    def _versions(self, tensors: Named) -> list[int]:
        version = self._version_of
        return [version(tensor) for _, tensor in tensors]

    def parameters_changed(self) -> bool:
        """Tell whether a parameter was written to since the last commit."""
        return self._versions(self._parameters) != self._parameter_versions

    def _gradients(self) -> list[tuple[weakref.ref[torch.Tensor], int] | None]:
        found = [parameter.grad for _, parameter in self._parameters]
        version = self._version_of
        return [None if grad is None else (weakref.ref(grad), version(grad)) for grad in found]

    def gradients_wait(self) -> bool:
        """Tell whether there are gradients that came after the last commit.

        Those that a step left behind when it was committed do not count: whether they are
        there depends on which process executed it.
        """
        for (_, parameter), old in zip(self._parameters, self._old_gradients, strict=True):
            grad = parameter.grad
            if grad is None:
                continue
            if old is None or old[0]() is not grad or old[1] != self._version_of(grad):
                return True
        return any(unreduced_gradients(module) for module in self._sharding)

    def check_unchanged(self) -> None:
        """Raise if parameters were changed outside a step.

        Raises:
            StateError: Names the first that was.
        """
        versions = self._versions(self._parameters)
        if versions == self._parameter_versions:
            return
        for (name, _), now, then in zip(
            self._parameters, versions, self._parameter_versions, strict=True
        ):
            if now != then:
                raise StateError(
                    f"protected parameter {name} was changed outside a step",
                    hint="change parameters only inside a function decorated with @run.step, or"
                    " before run.protect",
                )

    def note_local_buffers(self) -> None:
        """Take note of buffers that this step's forward passes have changed."""
        for (name, buffer), version in zip(self._buffers, self._buffer_versions, strict=True):
            if buffer._version != version:
                self._local.add(name)

    @property
    def has_buffers(self) -> bool:
        """Whether any registered module has buffers."""
        return bool(self._buffers)

    def local_buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers that differ by rank, live."""
        return {name: local_of(buffer) for name, buffer in self._buffers if name in self._local}

    def load_local_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        """Write `values` into the buffers of those names."""
        buffers = dict(self._buffers)
        self._local.update(values)
        with torch.no_grad():
            for name, value in values.items():
                local_of(buffers[name]).copy_(value)

    # ------------------------------------------------------------------ commit

    def capture(self) -> None:
        """Take the copy of small state that belongs to a commit."""
        self._small = self.copy_small()
        self._old_gradients = self._gradients()
        self._parameter_versions = self._versions(self._parameters)
        self._buffer_versions = self._versions(self._buffers)

    def image(self) -> Image:
        """Copy the replicated tensors."""
        copies = [(name, tensor.detach().clone()) for name, tensor in self.replicated()]
        # LBFGS keeps lists there, which it appends to.
        return Image(copies, copy_tree(self._optimizer_scalars()))

    def live(self) -> Image:
        """Return the replicated state itself, not a copy."""
        return Image(self.replicated(), self._optimizer_scalars())

    # ------------------------------------------------------------------ giving and taking

    @property
    def small(self) -> dict[str, Any]:
        """The small state as of the last commit; not changed any more."""
        return self._small

    def describe(self, image: Image, small: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what a newcomer needs beside the bytes of `image`: a JSON object.

        Args:
            image: The state.
            small: The small state that belongs to it; that of the last commit by default.
        """
        encoded = encoding.encode(
            {
                **(self._small if small is None else small),
                "scalars": image.scalars,
                "local": sorted(self._local),
            }
        )
        splits = {name: describe_split(t) for name, t in self._optimizer_tensors()}
        return {
            "layout": [
                [name, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type]
                for name, t in image.tensors
            ],
            "splits": {name: split for name, split in splits.items() if split is not None},
            "small": base64.b64encode(encoded).decode(),
        }

    def prepare(self, record: dict[str, Any]) -> Named:
        """Return the tensors to receive into, as `describe` listed them on the donor.

        Loads the small state on the way. Missing optimizer state is allocated.

        Raises:
            StateMismatchError: The donor has other tensors than this process.
        """
        small = encoding.decode(base64.b64decode(record["small"]))
        self._local = set(small["local"])
        self.load_small(small)
        self._load_scalars(small["scalars"])
        mine = {name: local_of(tensor) for name, tensor in (*self._parameters, *self._buffers)}
        found: Named = []
        for name, dtype_name, shape, device in record["layout"]:
            dtype = getattr(torch, dtype_name)
            tensor = mine.get(name)
            if tensor is None and "/" in name:
                split = record["splits"].get(name)
                tensor = self._optimizer_slot(name, dtype, shape, device, split)
            if tensor is None or tensor.dtype != dtype or list(tensor.shape) != shape:
                here = "nothing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
                raise StateMismatchError(
                    f"the survivors hold {name} as {dtype_name}{shape}, this process has {here}",
                    hint="every rank must build the same model and optimizer",
                )
            found.append((name, tensor))
        return found

    def whole(self) -> dict[str, torch.Tensor]:
        """Return the replicated tensors by name, live; split ones as DTensors."""
        shared = [(name, t) for name, t in self._buffers if name not in self._local]
        return dict((*self._parameters, *shared, *self._optimizer_tensors()))

    def describe_whole(self) -> dict[str, Any]:
        """Return what is needed beside the bytes of `whole`, on whatever mesh they are read."""
        record = self.describe(self.live())
        tensors = self.whole()
        for entry in record["layout"]:
            entry[2] = list(tensors[entry[0]].shape)
        return record

    @property
    def keeps_a_part(self) -> bool:
        """Whether an optimizer splits its state between ranks by itself."""
        return any(map(keeps_a_part, self.optimizers.values()))

    def own_names(self) -> set[str]:
        """Return the names of the tensors that no other rank has a part or a copy of."""
        return {n for n, _ in self._optimizer_tensors() if self._keeps_a_part(_owner_of(n))}

    def _keeps_a_part(self, owner: str) -> bool:
        return owner in self.optimizers and keeps_a_part(self.optimizers[owner])

    def describe_part(self) -> dict[str, Any]:
        """Return what `describe_whole` says on the first holder, for what this rank alone has."""
        if not self.keeps_a_part:
            return {}
        record, own = self.describe(self.live()), self.own_names()
        return {**record, "layout": [entry for entry in record["layout"] if entry[0] in own]}

    def prepare_whole(
        self, record: dict[str, Any], *parts: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors to read into, as `describe_whole` listed them on some mesh.

        Loads the small state on the way. Missing optimizer state is allocated: where it is as
        large as its parameter, it is split as the parameter is here. Where an optimizer keeps
        the state of some parameters only, the rest is left out: ranks may share the parameters
        out differently than those that wrote.

        Args:
            record: From `describe_whole` on the first holder.
            *parts: From `describe_part` on the other ranks.

        Raises:
            StateMismatchError: There are other tensors in this process.
        """
        here = dict((*self._parameters, *self._buffers))
        layout: list[list[Any]] = []
        splits: dict[str, Any] = {}
        entries = [entry for each in (record, *parts) for entry in each["layout"]]
        is_kept = self._kept_here()
        for name, dtype, shape, device in filter(lambda entry: is_kept(entry[0]), entries):
            parameter = self._parameter_of(name) if name not in here else here[name]
            split = describe_split(parameter) if parameter is not None else None
            local = shape
            if parameter is not None and split and list(parameter.shape) == shape:
                local, splits[name] = list(local_of(parameter).shape), split
            elif parameter is not None and split and name in record["splits"]:
                raise StateMismatchError(
                    f"{name} has shape {shape}, its parameter {list(parameter.shape)}: it cannot"
                    " be split for another mesh",
                    hint="resume on the mesh that the checkpoint was written on",
                )
            layout.append([name, dtype, local, device])
        listed = {entry[0] for entry in layout}
        for name, _ in self._parameters:
            if name not in listed:
                raise StateMismatchError(
                    f"the checkpoint does not hold {name}",
                    hint="build the model that it was written with; of a pipeline's stages, resume"
                    " on the same mesh",
                )
        self.prepare({**record, "layout": layout, "splits": splits})
        for part in parts:
            self._load_scalars(encoding.decode(base64.b64decode(part["small"]))["scalars"])
        everything = self.whole()
        return {entry[0]: everything[entry[0]] for entry in layout}

    def _kept_here(self) -> Callable[[str], bool]:
        """Return what tells of a name whether this rank keeps a tensor or scalar of that name."""
        owned = {name: owned_by(optimizer) for name, optimizer in self.optimizers.items()}

        def is_kept(name: str) -> bool:
            mine = owned.get(_owner_of(name))
            return mine is None or self._parameter_of(name) in mine

        return is_kept

    def _parameter_of(self, name: str) -> torch.Tensor | None:
        """Return the parameter that optimizer state of this name belongs to."""
        owner, index = _owner_of(name), name.rsplit("/", 2)[1] if _owner_of(name) else ""
        parameters = _parameters_of(self.optimizers[owner]) if owner in self.optimizers else []
        return parameters[int(index)] if index and int(index) < len(parameters) else None

    def copy_small(self) -> dict[str, Any]:
        """Return a copy of the small state as it is now."""
        return {
            "groups": {name: _groups_of(o) for name, o in self.optimizers.items()},
            "stateful": {name: copy_tree(o.state_dict()) for name, o in self.stateful.items()},
        }

    def restore(self, image: Image) -> None:
        """Write an image back, removing optimizer state that is not in it."""
        present = dict(image.tensors)
        for name, optimizer in self.optimizers.items():
            for index, parameter in enumerate(_parameters_of(optimizer)):
                if not any(key.startswith(f"{name}/{index}/") for key in present):
                    self._warm[parameter] = state_of(optimizer).pop(parameter, {})
        self._load_scalars(image.scalars)
        with torch.no_grad():
            for name, tensor in self.replicated():
                tensor.copy_(present[name])

    def _optimizer_slot(
        self,
        name: str,
        dtype: torch.dtype,
        shape: list[int],
        device: str,
        split: dict[str, Any] | None,
    ) -> torch.Tensor | None:
        owner, index, key = name.rsplit("/", 2)
        optimizer = self.optimizers.get(owner)
        parameters = _parameters_of(optimizer) if optimizer is not None else []
        if optimizer is None or int(index) >= len(parameters):
            return None
        parameter = parameters[int(index)]
        warm = self._warm.get(parameter, {}).pop(key, None)
        present = state_of(optimizer)[parameter].get(key, warm)
        local = None if present is None else local_of(present)
        if local is None or local.dtype != dtype or list(local.shape) != shape:
            place = parameter.device if device != "cpu" else torch.device("cpu")
            local = torch.empty(shape, dtype=dtype, device=place)
            present = restore_split(local, split, parameter)
        state_of(optimizer)[parameter][key] = present
        return local

    def load_small(self, small: dict[str, Any]) -> None:
        """Load what `copy_small` returned."""
        self._small = {"groups": small["groups"], "stateful": small["stateful"]}
        for name, groups in small["groups"].items():
            for group, values in zip(self.optimizers[name].param_groups, groups, strict=True):
                group.update(copy_tree(values))
        for name, value in small["stateful"].items():
            self.stateful[name].load_state_dict(copy_tree(value))

    def keep_buffers(self) -> None:
        """Copy all buffers, for `return_to_commit`: an evaluation on the way there changes them."""
        self._kept_buffers = [(buffer, buffer.detach().clone()) for _, buffer in self._buffers]

    def return_to_commit(self) -> None:
        """Put buffers and the small state back to those of the last commit, where they differ."""
        with torch.no_grad():
            for buffer, kept in self._kept_buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
        self._kept_buffers = []
        self._buffer_versions = self._versions(self._buffers)
        now, small = self.copy_small(), self._small
        differing = {
            kind: {
                name: value
                for name, value in small[kind].items()
                if encoding.encode(now[kind][name]) != encoding.encode(value)
            }
            for kind in small
        }
        self.load_small(differing)
        self._small = small

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        is_kept = self._kept_here()
        for name, value in scalars.items():
            if not is_kept(name):
                continue
            owner, index, key = name.rsplit("/", 2)
            optimizer = self.optimizers[owner]
            state_of(optimizer)[_parameters_of(optimizer)[int(index)]][key] = value

    def digest(self) -> str:
        """Return a digest of the replicated tensors, for comparing ranks."""
        digest = Digest()
        for name, tensor in self.replicated():
            digest.add(name, as_bytes(tensor).cpu())
        return digest.hex()


def _unique(tensors: Iterator[tuple[str, torch.Tensor]]) -> Named:
    seen: set[int] = set()
    found: Named = []
    for name, tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found.append((name, tensor))
    return found


def _running_statistics(modules: Mapping[str, torch.nn.Module]) -> set[str]:
    """Return the names of buffers whose changes torch's version counters do not show.

    Kernels of normalisation layers write their running statistics without counting it.
    """
    return {
        ".".join(filter(None, (name, path, key)))
        for name, module in modules.items()
        for path, layer in module.named_modules()
        if isinstance(layer, _NormBase)
        for key, _ in layer.named_buffers(recurse=False)
    }


def _owner_of(name: str) -> str:
    """Return the optimizer in the name of its state; empty for another name."""
    return name.rsplit("/", 2)[0] if name.count("/") >= 2 else ""


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: copy_tree(value) for key, value in group.items() if key not in _NOT_VALUES}
        for group in optimizer.param_groups
    ]


# The parameters themselves, and names that torch keeps beside them.
_NOT_VALUES = ("params", "param_names")


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


_IMMUTABLE = frozenset((type(None), bool, int, float, complex, str, bytes))


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
