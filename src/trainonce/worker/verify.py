"""Finds silent data corruption: replicated state that is no longer equal on all ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import xxhash

from trainonce.events import ReplicasDiffer
from trainonce.worker.transfer import as_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.worker.state import Named


def majority(values: list[int]) -> int | None:
    """Return the first rank that agrees with more than half of the ranks, if there is one."""
    value, count = Counter(values).most_common(1)[0]
    return values.index(value) if 2 * count > len(values) else None


def compare_replicas(tensors: Named, *, step: int, shards: Sequence[str]) -> ReplicasDiffer | None:
    """Compare tensors between the ranks that hold the same; repair what differs.

    What differs from the majority of its copies is repaired from it; tensors without a
    majority (two replicas that differ) are left as they are.

    Collective: every rank must call it, with the same names.

    Args:
        tensors: What this rank holds, by name.
        step: Committed steps, for the event.
        shards: Shard key by rank; those with the same key hold the same.

    Returns:
        What differed, the same on all ranks but for the names, which those that hold it know;
        None if nothing did.
    """
    world_size = len(shards)
    # Ranks that hold another part may have another number of tensors.
    most = torch.tensor([len(tensors)])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    mine = torch.zeros(int(most), 2, dtype=torch.int64)
    for index, (_, tensor) in enumerate(tensors):
        mine[index] = torch.tensor([_signed(_checksum(tensor)), tensor.nbytes])
    everywhere = [torch.zeros_like(mine) for _ in range(world_size)]
    dist.all_gather(everywhere, mine)
    alike = [[r for r in range(world_size) if shards[r] == key] for key in dict.fromkeys(shards)]
    names: list[str] = []
    odd: set[int] = set()
    repaired_from = -1
    for index, ranks in itertools.product(range(int(most)), alike):
        values = [int(everywhere[rank][index, 0]) for rank in ranks]
        if len(set(values)) == 1:
            continue
        name, tensor = tensors[index] if index < len(tensors) else ("", None)
        names.append(name if dist.get_rank() in ranks else f"{index} of ranks {ranks}")
        place = majority(values)
        if place is None:
            odd.update(ranks)
            continue
        odd.update(r for r, value in zip(ranks, values, strict=True) if value != values[place])
        repaired_from = ranks[place]
        _repair(tensor, ranks, repaired_from, int(everywhere[repaired_from][index, 1]))
    if not names:
        return None
    return ReplicasDiffer(
        step=step, odd_ranks=sorted(odd), names=names, repaired_from=repaired_from
    )


def tell(differ: ReplicasDiffer) -> str:
    """Return `differ` as one sentence."""
    names = ", ".join(differ.names[:3]) + (", …" if len(differ.names) > 3 else "")
    ending = "no majority, so nobody knows which copy is right"
    if differ.repaired_from >= 0:
        ending = f"repaired from rank {differ.repaired_from}"
    ranks = ", ".join(map(str, differ.odd_ranks))
    return f"replicas differ at step {differ.step}: {names} on rank {ranks}; {ending}"


def _repair(tensor: torch.Tensor | None, ranks: list[int], source: int, num_bytes: int) -> None:
    """Broadcast over all ranks, some of which hold another part; `ranks` take it over."""
    data = torch.empty(num_bytes, dtype=torch.uint8)
    if tensor is not None and dist.get_rank() == source:
        data.copy_(as_bytes(tensor))
    dist.broadcast(data, source)
    if tensor is not None and dist.get_rank() in ranks:
        tensor.data.copy_(data.view(tensor.dtype).view(tensor.shape))


def _checksum(tensor: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(as_bytes(tensor).cpu().numpy().data)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
