"""Recomputing activations in the backward pass, as much as a memory budget asks for."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from trainonce.errors import ConfigError
from trainonce.levers.base import LeverInfo, describes
from trainonce.levers.block_costs import DEAR, FULL, KEEP, SELECTIVE, BlockCost, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence


@dataclass(frozen=True, kw_only=True)
class Recomputing:
    """What `recompute` put in force.

    Args:
        modes: Of each block: "keep", "selective" or "full".
        kept_bytes: Activations of all blocks that are kept.
        without_bytes: The same with nothing recomputed.
        extra_flops: Computed a second time in each step.
        reason: Why, in one sentence.
        remove: Puts the blocks back as they were.
    """

    modes: tuple[str, ...]
    kept_bytes: int
    without_bytes: int
    extra_flops: int
    reason: str
    remove: Callable[[], None]


@describes(
    LeverInfo(
        name="recompute",
        saves="memory of activations, and with it accumulation or sharding; never FLOPs",
        source="Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; torch's "
        "selective activation checkpointing",
        applies="the batch does not fit, or fits only in parts",
        hurts="it does fit: up to a third more FLOPs for nothing",
        reversible=True,
        default_on=False,
    )
)
def recompute(
    blocks: Sequence[torch.nn.Module],
    forward: Callable[[], object],
    *,
    budget_bytes: int | None = None,
    share: float | None = None,
    enabled: bool = True,
) -> Recomputing:
    """Recompute activations of `blocks` where a budget asks for it, the cheapest bytes first.

    Each block is measured in one forward pass: what it keeps with everything kept, with the
    results of matrix products, convolutions and attention kept ("selective"), and with nothing
    kept ("full"). Then blocks are moved to cheaper modes, by FLOPs for each byte gained, until
    the rest fits. Gradients are bit for bit what they were: dropout draws the same again, and
    batch norms count a batch once.

    Args:
        blocks: Layers of a model that are called once in a forward pass.
        forward: Runs the model on a batch of the real size, with gradients on.
        budget_bytes: For the activations of all blocks together.
        share: Or as a share of what they keep now, 0 to 1.
        enabled: False measures nothing and changes nothing.

    Raises:
        ConfigError: No budget, or two; or not even recomputing everything meets it.
    """
    if not enabled:
        return Recomputing(
            modes=(KEEP,) * len(blocks), kept_bytes=0, without_bytes=0, extra_flops=0,
            reason="off: as asked", remove=lambda: None,
        )  # fmt: skip
    if (budget_bytes is None) == (share is None) or not 0 <= (share or 0) <= 1:
        raise ConfigError(
            f"no budget has {budget_bytes=} and {share=}", hint="give one; share from 0 to 1"
        )
    costs = measure(blocks, forward)
    without = sum(cost.kept_bytes[KEEP] for cost in costs)
    limit = round(without * (share or 0.0)) if budget_bytes is None else budget_bytes
    modes = choose(costs, limit)
    kept = sum(cost.kept_bytes[mode] for cost, mode in zip(costs, modes, strict=True))
    extra = sum(cost.extra_flops[mode] for cost, mode in zip(costs, modes, strict=True))
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in (KEEP, SELECTIVE, FULL))
    return Recomputing(
        modes=modes,
        kept_bytes=kept,
        without_bytes=without,
        extra_flops=extra,
        reason=f"{counts}: {kept:,} of {without:,} bytes, budget {limit:,}",
        remove=_put_all(blocks, modes),
    )


def recompute_all(blocks: Sequence[torch.nn.Module]) -> Recomputing:
    """Recompute everything in `blocks`, with nothing measured: not one sample fits otherwise."""
    modes = (FULL,) * len(blocks)
    return Recomputing(
        modes=modes, kept_bytes=0, without_bytes=0, extra_flops=0,
        reason=f"all of {len(blocks)} blocks, unmeasured", remove=_put_all(blocks, modes),
    )  # fmt: skip


def choose(costs: Sequence[BlockCost], limit: int) -> tuple[str, ...]:
    """Return a mode for each block so that all fit in `limit` bytes; pure.

    Greedy by extra FLOPs for each byte gained; ties go to the earlier block.

    Raises:
        ConfigError: They do not fit with everything recomputed.
    """
    modes = [KEEP] * len(costs)

    def used() -> int:
        return sum(cost.kept_bytes[mode] for cost, mode in zip(costs, modes, strict=True))

    def price(index: int, mode: str) -> float:
        cost, now = costs[index], modes[index]
        gained = cost.kept_bytes[now] - cost.kept_bytes[mode]
        return (cost.extra_flops[mode] - cost.extra_flops[now]) / gained

    while used() > limit:
        moves = [
            (price(index, mode), index, mode)
            for index, cost in enumerate(costs)
            for mode in (SELECTIVE, FULL)
            if cost.kept_bytes[mode] < cost.kept_bytes[modes[index]]
        ]
        if not moves:
            raise ConfigError(
                f"{used():,} bytes of activations stay with everything recomputed, and the budget "
                f"is {limit:,}",
                hint="a smaller batch, or more and smaller blocks",
            )
        _, index, mode = min(moves)
        modes[index] = mode
    return tuple(modes)


def _put_all(blocks: Sequence[torch.nn.Module], modes: Sequence[str]) -> Callable[[], None]:
    """Have each block run in its mode; return what puts them back."""
    undo = contextlib.ExitStack()
    for block, mode in zip(blocks, modes, strict=True):
        undo.callback(_put(block, mode))
    return undo.close


def _put(block: torch.nn.Module, mode: str) -> Callable[[], None]:
    """Have `block` run in a mode; return what puts it back."""
    if mode == KEEP:
        return lambda: None
    plain, own = block.forward, vars(block).get("forward")
    contexts = functools.partial(_contexts, block, mode)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = forward

    def remove() -> None:
        del block.forward  # the class's own shows again
        if own is not None:  # or the one that somebody had put there
            block.forward = own

    return remove


def _contexts(block: torch.nn.Module, mode: str) -> tuple[Any, Any]:
    """Return the contexts for the forward pass and for its repetition."""
    if mode == FULL:
        return contextlib.nullcontext(), _buffers_kept(block)
    first, again = create_selective_checkpoint_contexts(_policy)
    return first, _repeating(block, again)


@contextlib.contextmanager
def _repeating(block: torch.nn.Module, again: Any) -> Generator[None]:
    with _buffers_kept(block), again:
        yield


@contextlib.contextmanager
def _buffers_kept(block: torch.nn.Module) -> Generator[None]:
    """Undo what the repetition does to buffers: a batch norm would count its batch twice."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _policy(_context: Any, function: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    dear = function in DEAR
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def compile_budget(share: float) -> Generator[None]:
    """Have `torch.compile` keep only a share of the activations, by its own solver.

    Sets `torch._functorch.config.activation_memory_budget` while models are compiled, that is,
    in their first forward and backward pass.

    Raises:
        ConfigError: `share` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}", hint="from 0 (recompute all) to 1 (keep all)")
    from torch._functorch import config

    before = config.activation_memory_budget
    config.activation_memory_budget = share
    try:
        yield
    finally:
        config.activation_memory_budget = before
