"""Tensors on disk: torch.distributed.checkpoint over safetensors files, without pickle.

`torch.distributed.checkpoint` comes with two writers. `FileSystemWriter` pickles its
metadata, which this project does not read from a shared folder. `HuggingFaceStorageWriter`
writes plain safetensors, but gathers each file in memory under the interpreter lock, which
stops training for as long as that takes. `SafetensorsWriter` is the latter with the bytes
streamed to the file instead. `HuggingFaceStorageReader` reads the result, as does anything
else that knows safetensors.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trainonce.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
# What safetensors has no name for is stored as pairs of real numbers.
_NAMELESS = (torch.complex32, torch.complex128)


class SafetensorsWriter(HuggingFaceStorageWriter):
    """Writes each tensor into the file that is named for it.

    Args:
        path: Folder to write into.
        file_of: Tensor name to file name.
    """

    def __init__(self, path: str, file_of: Mapping[str, str]) -> None:
        super().__init__(path)
        self._file_of = file_of

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all tensors of `plan`; the future is done when this returns."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        results: list[WriteResult] = []
        storages: set[int] = set()
        for item in plan.items:
            name = item.index.fqn
            file = self._file_of[name]
            data: Any = planner.resolve_data(item)
            data = data.detach().cpu().contiguous()
            storage = data.untyped_storage().data_ptr()
            if storage in storages:  # a tied weight, which safetensors refuses to write twice
                data = data.clone()
            storages.add(storage)
            tensors.setdefault(file, {})[name] = data
            results.append(
                WriteResult(
                    index=item.index,
                    size_in_bytes=data.nbytes,
                    storage_data=_StorageInfo(file, 0, data.nbytes),
                )
            )
        for file, named in tensors.items():
            save_file(named, os.path.join(self.path, file), metadata={"format": "pt"})
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], model_names: Collection[str]
) -> None:
    """Write `tensors` into `folder`: those of `model_names` into a file of their own.

    Needs no process group, and uses none.

    Raises:
        OSError: The file system refuses.
        CheckpointError: A tensor has no form in a file.
    """
    state = {name: _storable(tensor) for name, tensor in tensors.items()}
    names = set(model_names)
    file_of = {name: MODEL_FILE if name in names else STATE_FILE for name in state}
    writer = SafetensorsWriter(str(folder), file_of)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # What dcp.save(no_dist=True) does, less its warning that there is no process group.
    planner.set_up_planner(state, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    try:
        results = writer.write_data(plan, planner).wait()
    except SafetensorError as error:
        raise _explain(error) from error
    writer.finish(metadata, [results])


def read_tensors(folder: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Fill `into` from `folder`, in place; a narrower stored dtype is widened.

    Args:
        folder: What `write_tensors` wrote to.
        into: Tensors of the names and shapes to read, on any device.

    Raises:
        CheckpointError: A name is not there, or its shape differs.
    """
    stored = stored_shapes(folder)
    missing = sorted(into.keys() - stored.keys())
    if missing:
        raise CheckpointError(
            f"{folder} has no tensor {_some(missing)}",
            hint="build the model and optimizer that the checkpoint was written with",
        )
    targets = {name: _storable(tensor.detach()) for name, tensor in into.items()}
    for name, target in targets.items():
        if tuple(target.shape) != stored[name]:
            raise CheckpointError(
                f"{name} has shape {tuple(into[name].shape)}, and {stored[name]} in {folder}",
                hint="build the model and optimizer that the checkpoint was written with",
            )
    reader = HuggingFaceStorageReader(str(folder))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in `folder`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in (MODEL_FILE, STATE_FILE):
        if (folder / file).exists():
            with safe_open(folder / file, framework="pt") as found:
                for name in found.keys():
                    shapes[name] = tuple(found.get_slice(name).get_shape())
    return shapes


def export_model(
    folder: Path, target: Path, *, prefix: str = "", dtype: torch.dtype | None = None
) -> None:
    """Write the model's tensors of the checkpoint in `folder` as one safetensors file.

    Args:
        folder: A checkpoint.
        target: The file; replaced as a whole, or not at all.
        prefix: Cut off the names; tensors without it are left out.
        dtype: Convert floating-point tensors to it.

    Raises:
        CheckpointError: There is no such tensor.
    """
    if not (folder / MODEL_FILE).exists():
        raise CheckpointError(
            f"{folder} holds no model", hint="save with model_names, the names of its tensors"
        )
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(folder / MODEL_FILE, framework="pt") as found:
        for name in found.keys():
            if name.startswith(prefix):
                tensor = found.get_tensor(name)
                convert = dtype is not None and tensor.is_floating_point()
                tensors[name.removeprefix(prefix)] = tensor.to(dtype) if convert else tensor
    if not tensors:
        raise CheckpointError(f"no tensor of the model in {folder} begins with {prefix!r}")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(target)


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, or its real and imaginary parts where safetensors has no name for it."""
    if tensor.dtype not in _NAMELESS:
        return tensor
    return torch.view_as_real(tensor)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _explain(error: SafetensorError) -> Exception:
    """Return the OSError behind a safetensors error, which it tells by text only."""
    _text, found, number = str(error).rpartition("(os error ")
    if found:
        code = int(number.removesuffix(")"))
        return OSError(code, os.strerror(code))
    return CheckpointError(f"these tensors cannot be written: {error}")
