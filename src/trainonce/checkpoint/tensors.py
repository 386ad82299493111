"""Tensors on disk: torch.distributed.checkpoint over safetensors files, without pickle.

`torch.distributed.checkpoint` comes with two writers. `FileSystemWriter` pickles its
metadata, which this project does not read from a shared folder. `HuggingFaceStorageWriter`
writes plain safetensors, but gathers each file in memory under the interpreter lock, which
stops training for as long as that takes. `SafetensorsWriter` is the latter with the bytes
streamed to the file instead. `HuggingFaceStorageReader` reads the result, as does anything
else that knows safetensors.

Of a tensor that is split between ranks (a DTensor) each rank writes its part into a file of
its own, with its place in the whole in the file's metadata, as torch does. A reader asks for
whatever part it needs, so that a checkpoint can be read on another mesh, or on none.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from trainonce.checkpoint.files import write_whole
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
        split: Whether there are parts of tensors: then the files say where each belongs.
    """

    def __init__(self, path: str, file_of: Mapping[str, str], *, split: bool = False) -> None:
        super().__init__(path)
        self._file_of = file_of
        self._split = split

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all tensors of `plan`; the future is done when this returns."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        places: dict[str, dict[str, dict[str, list[int]]]] = {}
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
            offset = list(item.index.offset or [0] * data.dim())
            places.setdefault(file, {})[name] = {SAVED_OFFSETS_KEY: offset}
            results.append(
                WriteResult(
                    index=item.index,
                    size_in_bytes=data.nbytes,
                    storage_data=_StorageInfo(file, 0, data.nbytes),
                )
            )
        for file, named in tensors.items():
            notes = {"format": "pt"}
            if self._split:
                notes[CUSTOM_METADATA_KEY] = json.dumps(places[file])
            save_file(named, os.path.join(self.path, file), metadata=notes)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def is_mine_to_write(tensor: torch.Tensor, rank: int, first: int = 0) -> bool:
    """Tell whether `rank` writes its part of `tensor`, of which others may hold copies.

    One rank writes each part: what is whole the `first` of those that hold it, and of what is
    split the rank that stands first on every axis of the mesh that does not split it.
    """
    if not isinstance(tensor, DTensor):
        return rank == first
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or (tensor.to_local().numel() == 0 and tensor.numel() > 0):
        return False
    return all(
        place == 0 or not placement.is_replicate()
        for place, placement in zip(coordinate, tensor.placements, strict=True)
    )


def write_tensors(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    model_names: Collection[str],
    *,
    part: int = 0,
    split: bool = False,
) -> None:
    """Write `tensors` into `folder`: those of `model_names` into a file of their own.

    Needs no process group, and uses none. Of a DTensor the local part is written.

    Args:
        folder: Where to.
        tensors: By name.
        model_names: Names of the model's.
        part: Number of these files among those of one checkpoint.
        split: There are other such files, also where no tensor is split.

    Raises:
        OSError: The file system refuses.
        CheckpointError: A tensor has no form in a file.
    """
    state = {name: _storable(tensor) for name, tensor in tensors.items()}
    names = set(model_names)
    model_file, state_file = file_names(part)
    file_of = {name: model_file if name in names else state_file for name in state}
    split = split or part > 0 or any(isinstance(tensor, DTensor) for tensor in state.values())
    writer = SafetensorsWriter(str(folder), file_of, split=split)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # What dcp.save(no_dist=True) does, less its warning that there is no process group.
    planner.set_up_planner(state, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    if split:
        # A global plan would want all parts at once; the files say what is where.
        plans, metadata = [plan], None
    else:
        plans, metadata = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    try:
        results = writer.write_data(plan, planner).wait()
    except SafetensorError as error:
        raise _explain(error) from error
    if metadata is not None:
        writer.finish(metadata, [results])


def file_names(part: int) -> tuple[str, str]:
    """Return the names of the files that hold part `part` of the model, and of other tensors."""
    if part == 0:
        return MODEL_FILE, STATE_FILE
    return f"model-{part:05d}.safetensors", f"state-{part:05d}.safetensors"


def read_tensors(folder: Path, into: Mapping[str, torch.Tensor]) -> None:
    """Fill `into` from `folder`, in place; a narrower stored dtype is widened.

    Args:
        folder: What `write_tensors` wrote to, on whatever mesh; or a model in Hugging Face's
            layout.
        into: Tensors of the names and (whole) shapes to read, on any device. Of a DTensor the
            local part is read.

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


def stored_shapes(folder: Path, pattern: str = "*.safetensors") -> dict[str, tuple[int, ...]]:
    """Return the names and whole shapes of the tensors in the files of `folder`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, framework="pt") as found:
            places = json.loads((found.metadata() or {}).get(CUSTOM_METADATA_KEY, "{}"))
            for name in found.keys():
                shape = found.get_slice(name).get_shape()
                offset = places.get(name, {}).get(SAVED_OFFSETS_KEY, [0] * len(shape))
                known = shapes.get(name, (0,) * len(shape))
                ends = [begin + size for begin, size in zip(offset, shape, strict=True)]
                shapes[name] = tuple(map(max, known, ends))
    return shapes


def export_model(
    folder: Path,
    target: Path,
    *,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    max_file_bytes: int | None = None,
) -> None:
    """Write the model's tensors of the checkpoint in `folder` in Hugging Face's layout.

    One safetensors file; or several beside it, and an index that says which tensor is where.

    Args:
        folder: A checkpoint.
        target: The file, usually `model.safetensors`; replaced as a whole, or not at all.
        prefix: Cut off the names; tensors without it are left out.
        dtype: Convert floating-point tensors to it.
        max_file_bytes: Begin another file where one would grow beyond this.

    Raises:
        CheckpointError: There is no such tensor.
    """
    names = [
        name for name in stored_shapes(folder, "model*.safetensors") if name.startswith(prefix)
    ]
    if not any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no model", hint="save with model_names, the names of its tensors"
        )
    if not names:
        raise CheckpointError(f"no tensor of the model in {folder} begins with {prefix!r}")
    files = _pack(folder, names, dtype, max_file_bytes)
    targets = [target] if len(files) == 1 else [
        target.with_name(f"{target.stem}-{number:05d}-of-{len(files):05d}{target.suffix}")
        for number in range(1, len(files) + 1)
    ]  # fmt: skip
    place_of: dict[str, str] = {}
    total = 0
    for each, inside in zip(targets, files, strict=True):
        tensors = read_whole(folder, inside, dtype=dtype)
        total += sum(tensor.nbytes for tensor in tensors.values())
        place_of |= {name.removeprefix(prefix): each.name for name in inside}
        part = each.with_name(f".{each.name}.{os.getpid()}.part")
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        save_file(named, part, metadata={"format": "pt"})
        part.replace(each)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place_of}
        write_whole(
            target.with_name(f"{target.name}.index.json"), json.dumps(index, indent=2).encode()
        )


def _pack(
    folder: Path, names: list[str], dtype: torch.dtype | None, max_file_bytes: int | None
) -> list[list[str]]:
    """Return the names by file, in their order."""
    if max_file_bytes is None:
        return [names]
    shapes, dtypes = stored_shapes(folder), _stored_dtypes(folder)
    files: list[list[str]] = [[]]
    filled = 0
    for name in names:
        convert = dtype is not None and dtypes[name].is_floating_point
        size = math.prod(shapes[name]) * (dtype if convert and dtype else dtypes[name]).itemsize
        if files[-1] and filled + size > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def read_whole(
    folder: Path, names: Collection[str], *, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Return tensors of `folder`, put together from their parts.

    Args:
        folder: A checkpoint, or a model in Hugging Face's layout.
        names: Which.
        dtype: Convert floating-point tensors to it.
    """
    shapes = stored_shapes(folder)
    dtypes = _stored_dtypes(folder)
    found = {name: torch.empty(shapes[name], dtype=dtypes[name]) for name in names}
    read_tensors(folder, found)
    if dtype is None:
        return found
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: entry.properties.dtype  # type: ignore[union-attr]
        for name, entry in metadata.state_dict_metadata.items()
    }


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, or its real and imaginary parts where safetensors has no name for it."""
    if tensor.dtype not in _NAMELESS:
        return tensor
    if isinstance(tensor, DTensor):
        raise CheckpointError(
            f"a split tensor of {tensor.dtype} has no form in a file",
            hint="keep its real and imaginary parts as tensors of their own",
        )
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
