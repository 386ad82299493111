"""What a script under test tells its test: records in a file a rank, digests of its state.

For the test side see `trainonce.testing.jobs`. A script works without a test as well: then
nothing is recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce import settings

if TYPE_CHECKING:
    import torch


def record(rank: int, **values: Any) -> None:
    """Append `values` to the records of `rank`, for `JobResult.records`.

    One line is one write, so a process that is killed leaves whole lines. Code between steps
    runs again on a rank that is rebuilt, and its records come again with it: where that
    matters, record something that names the step, or record once at the end.

    Args:
        rank: Whose records.
        **values: Anything that JSON can hold.
    """
    folder = settings.TEST_RECORDS.get()
    if folder is None:
        return
    line = json.dumps(values) + "\n"
    path = Path(folder) / f"rank{rank}.jsonl"
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(target, line.encode())
    finally:
        os.close(target)


def read_records(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the records in `folder` by rank, in the order in which they were written."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        lines = path.read_text().splitlines()
        found[int(path.stem.removeprefix("rank"))] = [json.loads(line) for line in lines]
    return found


def state_digests(**objects: Any) -> dict[str, str]:
    """Return a digest of each part of `objects`, equal where every bit is equal.

    Args:
        **objects: Modules (wrapped in DDP or not), optimizers, anything with a `state_dict`,
            tensors, or plain values.

    Returns:
        BLAKE2b digests in hex. A module `net` gives "net.parameters" and "net.buffers", so
        that a difference says where it is; everything else gives one digest under its name.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    found: dict[str, str] = {}
    for name, value in objects.items():
        module = value.module if isinstance(value, DistributedDataParallel) else value
        if isinstance(module, torch.nn.Module):
            found[f"{name}.parameters"] = _digest(dict(module.named_parameters()))
            found[f"{name}.buffers"] = _digest(dict(module.named_buffers()))
        elif hasattr(value, "state_dict"):
            found[name] = _digest(value.state_dict())
        else:
            found[name] = _digest(value)
    return found


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> list[bytes]:
    """Return what identifies `value`: structure, types and the exact bits of numbers."""
    import torch

    if isinstance(value, torch.Tensor):
        return _tensor_parts(value)
    if isinstance(value, Mapping):
        # Steps that differ in order can leave dicts of other orders with equal content.
        keys = sorted(value, key=repr)
        return [b"{", *(part for key in keys for part in (repr(key).encode(), *_parts(value[key])))]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [b"[", *(part for each in value for part in _parts(each)), b"]"]
    if isinstance(value, bool | int | float | str | bytes | None):
        return [f"{type(value).__name__}:{value!r};".encode()]
    if hasattr(value, "state_dict"):
        return _parts(value.state_dict())
    raise TypeError(f"no digest for {type(value).__name__}: give tensors, modules or plain values")


def _tensor_parts(tensor: torch.Tensor) -> list[bytes]:
    import torch

    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [f"{tensor.dtype}{list(tensor.shape)}:".encode(), plain.numpy().tobytes()]
