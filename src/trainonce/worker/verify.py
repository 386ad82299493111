"""Finds silent data corruption: replicated state that is no longer equal on all ranks."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import xxhash

from trainonce.events import ReplicasDiffer
from trainonce.worker.transfer import as_bytes

if TYPE_CHECKING:
    from trainonce.worker.state import Named


def majority(values: list[int]) -> int | None:
    """Return the first rank that agrees with more than half of the ranks, if there is one."""
    value, count = Counter(values).most_common(1)[0]
    return values.index(value) if 2 * count > len(values) else None


def compare_replicas(tensors: Named, *, step: int, world_size: int) -> ReplicasDiffer | None:
    """Compare replicated tensors between ranks; repair those that differ from the majority.

    Collective: every rank must call it, with the same names. Tensors without a majority (two
    replicas that differ) are left as they are.

    Returns:
        What differed, the same on all ranks; None if nothing did.
    """
    mine = torch.tensor([_signed(_checksum(t)) for _, t in tensors])
    everywhere = [torch.zeros_like(mine) for _ in range(world_size)]
    dist.all_gather(everywhere, mine)
    names: list[str] = []
    odd: set[int] = set()
    repaired_from = -1
    for index, (name, tensor) in enumerate(tensors):
        values = [int(each[index]) for each in everywhere]
        if len(set(values)) == 1:
            continue
        names.append(name)
        source = majority(values)
        if source is None:
            odd.update(range(world_size))
            continue
        odd.update(rank for rank, value in enumerate(values) if value != values[source])
        repaired_from = source
        dist.broadcast(tensor.data, source)
    if not names:
        return None
    return ReplicasDiffer(
        step=step, odd_ranks=sorted(odd), names=names, repaired_from=repaired_from
    )


def _checksum(tensor: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(as_bytes(tensor).cpu().numpy().data)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
