"""What ranks tell each other at `run.protect`: what they build, and who holds which part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trainonce.errors import StateMismatchError
from trainonce.worker.shards import check_replicas

if TYPE_CHECKING:
    from trainonce.worker.state import Protected


def compare_layouts(
    protected: Protected, *, rank: int, world_size: int, subgroups: bool
) -> tuple[list[str], bool]:
    """Compare what every rank registered. Collective.

    Args:
        protected: What this rank registered.
        rank: Of this process.
        world_size: Number of ranks.
        subgroups: Whether this rank knows of groups of some of the ranks.

    Returns:
        Shard key by rank, and whether any rank knows of such groups.

    Raises:
        StateMismatchError: Ranks that should hold the same registered different things.
        ConfigError: Ranks do not agree about who holds the same.
    """
    if world_size == 1:
        return [""], subgroups
    layout = protected.layout()
    everywhere: list[Any] = [None] * world_size
    mine = (layout, subgroups, protected.shard_key(rank), protected.replicas)
    dist.all_gather_object(everywhere, mine)
    check_replicas([replicas for *_, replicas in everywhere])
    for other in protected.replicas or range(world_size):
        # In order: the same mistake is to be known by the same words when it is met again.
        for different in sorted(set(layout).symmetric_difference(everywhere[other][0])):
            raise StateMismatchError(
                f"ranks {rank} and {other} registered different state: {different}",
                hint="build the same model and optimizer on every rank before run.protect; of a"
                " pipeline's stages, say which ranks hold the same:"
                ' run.protect(..., replicas=mesh["replicate"])',
            )
    return [key for _, _, key, _ in everywhere], any(found for _, found, *_ in everywhere)
