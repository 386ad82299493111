"""Which part of the state a rank holds, where state is split between ranks.

A DTensor says how it is split: its placement on each axis of its mesh, and where this rank
stands on it. Ranks whose tensors are split alike and who stand at the same place on every
axis that splits hold the same bytes: one can be rebuilt from the others. Stages of a pipeline
hold different state altogether, and the script says which ranks hold the same. That identity is
the *shard key*; it is empty where nothing is split.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from trainonce.errors import ConfigError
from trainonce.worker.transfer import as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.tensor.placement_types import Placement

_SHARD = re.compile(r"S(\d+)(?:/(\d+))?")


def describe_split(tensor: torch.Tensor) -> dict[str, Any] | None:
    """Return how a DTensor is split, as plain values; None for any other tensor.

    Raises:
        ConfigError: It has a placement that cannot be kept, such as a pending sum.
    """
    if not isinstance(tensor, DTensor):
        return None
    return {
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "placements": [_placement_text(each) for each in tensor.placements],
    }


def restore_split(
    local: torch.Tensor, split: dict[str, Any] | None, like: torch.Tensor
) -> torch.Tensor:
    """Return the tensor that `describe_split` described, given its local part.

    Args:
        local: What this rank holds.
        split: From `describe_split`; None gives `local` itself.
        like: A DTensor on the mesh that it belongs to: the parameter that it is state of.
    """
    if split is None or not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local,
        like.device_mesh,
        [_placement_of(text) for text in split["placements"]],
        run_check=False,
        shape=torch.Size(split["shape"]),
        stride=tuple(split["stride"]),
    )


def split_text(tensor: torch.Tensor) -> str:
    """Return a tensor's shape and how it is split; the same on all ranks."""
    split = describe_split(tensor)
    shape = str(list(tensor.shape))
    return shape if split is None else f"{shape}@{','.join(split['placements'])}"


def ranks_of(replicas: object, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[int, ...]:
    """Return the global ranks of a mesh or a group, in ascending order.

    Args:
        replicas: A `DeviceMesh` or a `ProcessGroup`, of the ranks that hold the same state as this
            one, or parts of the same tensors.
        tensors: Every protected tensor, by name.

    Raises:
        ConfigError: It is neither, or leaves out this rank, or one that holds a part.
    """
    if isinstance(replicas, DeviceMesh):
        ranks = replicas.mesh.flatten().tolist()
    elif isinstance(replicas, dist.ProcessGroup):
        ranks = dist.get_process_group_ranks(replicas)
    else:
        raise ConfigError(
            f"replicas is {type(replicas).__name__}",
            hint='give the axis of the mesh: run.protect(..., replicas=mesh["replicate"])',
        )
    if dist.get_rank() not in ranks:
        raise ConfigError(
            f"rank {dist.get_rank()} is not among its own replicas, ranks {ranks}",
            hint="give the mesh or group of the ranks that hold the same state as this one",
        )
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            others = set(tensor.device_mesh.mesh.flatten().tolist()).difference(ranks)
            if others:
                raise ConfigError(
                    f"{name} is split between more ranks than the replicas, ranks {ranks}: also"
                    f" {sorted(others)}",
                    hint='give the axes that split it too: replicas=mesh["replicate", "shard"]',
                )
    return tuple(sorted(ranks))


def check_replicas(table: Sequence[Sequence[int] | None]) -> None:
    """Check that ranks agree about which of them hold the same.

    Args:
        table: By rank, the ranks that it says hold the same as it; None for all.

    Raises:
        ConfigError: Names two that disagree.
    """
    for rank, mine in enumerate(table):
        for other in range(len(table)) if mine is None else mine:
            if table[other] != mine:
                raise ConfigError(
                    f"rank {rank} says that ranks {_named(mine)} hold the same state, rank"
                    f" {other} that ranks {_named(table[other])} do",
                    hint='give run.protect(..., replicas=mesh["replicate"]) on every rank',
                )


def _named(ranks: Sequence[int] | None) -> str:
    return "of the whole job" if ranks is None else ", ".join(map(str, ranks))


def shard_key(
    tensors: Iterable[tuple[str, torch.Tensor]],
    optimizers: Iterable[Any],
    rank: int,
    replicas: Sequence[int] | None = None,
) -> str:
    """Return what identifies the part of the state that this rank holds.

    Args:
        tensors: Every protected tensor, by name.
        optimizers: Protected optimizers; one that splits its state between ranks by itself
            makes each rank's part its own.
        rank: This rank.
        replicas: Ranks that hold the same names and shapes; None for all.
    """
    lines: list[str] = [] if replicas is None else [f"held by {list(replicas)}"]
    for name, tensor in tensors:
        if not isinstance(tensor, DTensor):
            continue
        coordinate = tensor.device_mesh.get_coordinate()
        place = [
            f"{axis}:{_placement_text(placement)}:{coordinate[axis] if coordinate else None}"
            for axis, placement in enumerate(tensor.placements)
            if _splits(placement) and tensor.device_mesh.size(axis) > 1
        ]
        if place:
            lines.append(f"{name}{list(tensor.shape)}@{','.join(place)}")
    lines += [f"own:{rank}" for each in optimizers if keeps_a_part(each)]
    if not lines:
        return ""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def keeps_a_part(optimizer: Any) -> bool:
    """Tell whether an optimizer splits its state between ranks by itself."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def state_of(optimizer: torch.optim.Optimizer) -> dict[Any, dict[str, Any]]:
    """Return the state that an optimizer keeps on this rank, by parameter."""
    return optimizer.optim.state if keeps_a_part(optimizer) else optimizer.state  # type: ignore[attr-defined]


def owned_by(optimizer: torch.optim.Optimizer) -> set[torch.Tensor] | None:
    """Return the parameters whose state an optimizer keeps on this rank; None for all."""
    if not keeps_a_part(optimizer):
        return None
    groups = optimizer.optim.param_groups  # type: ignore[attr-defined]
    return {parameter for group in groups for parameter in group["params"]}


def stripe(
    tensors: Sequence[tuple[str, torch.Tensor]], index: int, count: int
) -> list[tuple[str, torch.Tensor]]:
    """Return part `index` of `count` parts of about equal size, as named runs of bytes.

    Every rank that holds tensors of these sizes cuts them alike, so that several ranks can each
    give one part. What is returned are views, except where a layout allows none: such a
    tensor stays whole.
    """
    if count == 1:
        return list(tensors)
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    begin, end = total * index // count, total * (index + 1) // count
    found: list[tuple[str, torch.Tensor]] = []
    offset = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        first, last = max(begin - offset, 0), min(end - offset, size)
        if not tensor.is_contiguous() or size == 0:
            if begin <= offset < end or (offset == total and index == count - 1):
                found.append((name, tensor))
        elif first < last:
            part = as_bytes(tensor)[first:last] if last - first < size else tensor
            found.append((f"{name}[{first}:{last}]", part))
        offset += size
    return found


def copy_holders(table: Sequence[str], num: int) -> frozenset[int]:
    """Return the first `num` ranks that hold each part of the state.

    Args:
        table: Shard key by rank.
        num: How many copies of each part are wanted.
    """
    ranks: dict[str, list[int]] = {}
    for rank, key in enumerate(table):
        ranks.setdefault(key, []).append(rank)
    return frozenset(rank for alike in ranks.values() for rank in alike[:num])


def describe_copies(table: Sequence[str]) -> str:
    """Return in words which part of the state has how many living copies.

    Args:
        table: Shard key by rank.
    """
    if len(set(table)) == 1:
        return f"every rank holds the whole state: {len(table)} living copies"
    counts = Counter(Counter(table).values())
    parts = [
        f"{num} part{'s' if num > 1 else ''} with {copies} living cop{'ies' if copies > 1 else 'y'}"
        for copies, num in sorted(counts.items())
    ]
    return f"the state is split into {len(set(table))}: " + ", ".join(parts)


def _placement_text(placement: Placement) -> str:
    if isinstance(placement, _StridedShard):
        return f"S{placement.dim}/{placement.split_factor}"
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    if isinstance(placement, Replicate):
        return "R"
    raise ConfigError(
        f"a protected tensor is placed as {placement}, which is no state",
        hint="protect parameters and optimizer state, not values that wait for a reduction",
    )


def _placement_of(text: str) -> Placement:
    if text == "R":
        return Replicate()
    match = _SHARD.fullmatch(text)
    assert match is not None, text
    if match[2]:
        return _StridedShard(int(match[1]), split_factor=int(match[2]))
    return Shard(int(match[1]))


def _splits(placement: Placement) -> bool:
    return isinstance(placement, Shard | _StridedShard)
