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
import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from trainonce.errors import ConfigError, StateError, StateMismatchError
from trainonce.wire import encoding
from trainonce.worker.copies import copy_tree
from trainonce.worker.hooks import HookStates
from trainonce.worker.modes import Modes
from trainonce.worker.optimizers import OptimizerStates, strides_of
from trainonce.worker.shards import (
    describe_split,
    shard_key,
    split_text,
)
from trainonce.worker.torch_private import (
    local_of,
    set_stepped,
    shards_parameters,
    unreduced_gradients,
    version_of,
    was_stepped,
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
        self.states = OptimizerStates(self.optimizers)
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
        self.states.settle()
        self.modes = Modes(
            (
                (f"{name}.{path}", each)
                for name, module in self.modules.items()
                for path, each in module.named_modules()
            ),
            self._parameters,
        )
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
        everything = (*self._parameters, *shared, *self.states.tensors())
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
        return Image(copies, copy_tree(self.states.scalars()))

    def live(self) -> Image:
        """Return the replicated state itself, not a copy."""
        return Image(self.replicated(), self.states.scalars())

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
        splits = {name: describe_split(t) for name, t in self.states.tensors()}
        names = {parameter: name for name, parameter in self._parameters}
        groups = (self._small if small is None else small).get("groups", {})
        return {
            "added": self.states.added_groups(names, groups),
            "layout": [
                [name, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type]
                for name, t in image.tensors
            ],
            "strides": {
                name: strides for name, t in image.tensors if (strides := strides_of(t)) is not None
            },
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
        self.states.add_groups(record.get("added", {}), dict(self._parameters))
        self.load_small(small)
        self.states.load_scalars(small["scalars"])
        mine = {name: local_of(tensor) for name, tensor in (*self._parameters, *self._buffers)}
        found: Named = []
        for name, dtype_name, shape, device in record["layout"]:
            dtype = getattr(torch, dtype_name)
            tensor = mine.get(name)
            if tensor is None and "/" in name:
                split = record["splits"].get(name)
                strides = record.get("strides", {}).get(name)
                tensor = self.states.slot(name, dtype, shape, device, split, strides)
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
        return dict((*self._parameters, *shared, *self.states.tensors()))

    def describe_whole(self) -> dict[str, Any]:
        """Return what is needed beside the bytes of `whole`, on whatever mesh they are read."""
        record = self.describe(self.live())
        tensors = self.whole()
        for entry in record["layout"]:
            entry[2] = list(tensors[entry[0]].shape)
        return record

    def describe_part(self) -> dict[str, Any]:
        """Return what `describe_whole` says on the first holder, for what this rank alone has."""
        if not self.states.keeps_a_part:
            return {}
        record, own = self.describe(self.live()), self.states.own_names()
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
        is_kept = self.states.kept_here()
        for name, dtype, shape, device in filter(lambda entry: is_kept(entry[0]), entries):
            parameter = self.states.parameter_of(name) if name not in here else here[name]
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
        strides = {n: each for n, each in record.get("strides", {}).items() if n not in splits}
        self.prepare({**record, "layout": layout, "splits": splits, "strides": strides})
        for part in parts:
            self.states.load_scalars(encoding.decode(base64.b64decode(part["small"]))["scalars"])
        everything = self.whole()
        return {entry[0]: everything[entry[0]] for entry in layout}

    def copy_small(self) -> dict[str, Any]:
        """Return a copy of the small state as it is now."""
        return {
            "groups": self.states.groups(),
            "stateful": {name: copy_tree(o.state_dict()) for name, o in self.stateful.items()},
            "stepped": {name: was_stepped(o) for name, o in self.optimizers.items()},
        }

    def restore(self, image: Image) -> None:
        """Write an image back, removing optimizer state that is not in it."""
        present = dict(image.tensors)
        self.states.drop_others(present)
        self.states.load_scalars(image.scalars)
        with torch.no_grad():
            for name, tensor in self.replicated():
                tensor.copy_(present[name])

    def load_small(self, small: dict[str, Any]) -> None:
        """Load what `copy_small` returned."""
        stepped = small.get("stepped", {})  # older checkpoints do not say
        self._small = {
            "groups": small["groups"],
            "stateful": small["stateful"],
            "stepped": stepped,
        }
        self.states.load_groups(small["groups"])
        for name, value in small["stateful"].items():
            self.stateful[name].load_state_dict(copy_tree(value))
        for name, value in stepped.items():
            set_stepped(self.optimizers[name], value)

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
        self.modes.return_to_commit()
        self.states.let_groups_be_added()
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
