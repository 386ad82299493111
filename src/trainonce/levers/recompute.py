"""Recomputing activations in the backward pass, as much as a memory budget asks for."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from trainonce.errors import ConfigError
from trainonce.levers.base import LeverInfo, describes
from trainonce.levers.batches import tensors
from trainonce.levers.flops import FORMULAS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

KEEP, SELECTIVE, FULL = "keep", "selective", "full"
_aten = torch.ops.aten
# What is dear to compute a second time: these results are kept where recomputing is selective.
_DEAR = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten.linear.default, _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """What one block keeps for the backward pass, and what it costs not to.

    Args:
        kept_bytes: Activations it keeps, by mode.
        extra_flops: FLOPs computed a second time, by mode.
    """

    kept_bytes: dict[str, int]
    extra_flops: dict[str, int]


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
    undo = [_put(block, mode) for block, mode in zip(blocks, modes, strict=True)]

    def remove() -> None:
        for each in undo:
            each()

    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in (KEEP, SELECTIVE, FULL))
    return Recomputing(
        modes=modes,
        kept_bytes=kept,
        without_bytes=without,
        extra_flops=extra,
        reason=f"{counts}: {kept:,} of {without:,} bytes, budget {limit:,}",
        remove=remove,
    )


def recompute_all(blocks: Sequence[torch.nn.Module]) -> Recomputing:
    """Recompute everything in `blocks`, with nothing measured: not one sample fits otherwise."""
    undo = [_put(block, FULL) for block in blocks]

    def remove() -> None:
        for each in undo:
            each()

    return Recomputing(
        modes=(FULL,) * len(blocks), kept_bytes=0, without_bytes=0, extra_flops=0,
        reason=f"all of {len(blocks)} blocks, unmeasured", remove=remove,
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


def measure(blocks: Sequence[torch.nn.Module], forward: Callable[[], object]) -> list[BlockCost]:
    """Return what each block keeps and would recompute in each mode, by one forward pass.

    Raises:
        ConfigError: A block is not called exactly once in it.
    """
    meters = [_Meter(block) for block in blocks]
    try:
        forward()
    finally:
        for meter in meters:
            meter.remove()
    for index, meter in enumerate(meters):
        if meter.calls != 1:
            raise ConfigError(
                f"block {index} was called {meter.calls} times in the forward pass",
                hint="give blocks that are called once each, and a forward pass with gradients",
            )
    return [meter.cost() for meter in meters]


class _Meter:
    """Watches one block in a forward pass."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.calls = 0
        self._own = {p.untyped_storage().data_ptr() for p in block.parameters()}
        self._input_bytes = 0
        self._saved: dict[int, int] = {}
        self._dear = _DearResults()
        self._flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._open = contextlib.ExitStack()
        self._handles = [
            block.register_forward_pre_hook(self._begin, with_kwargs=True),
            block.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, _block: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.calls += 1
        self._input_bytes = sum(t.nbytes for t in tensors((*args, *kwargs.values())))
        self._open.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _same))
        self._open.enter_context(self._flops)
        self._open.enter_context(self._dear)

    def _end(self, *_: Any) -> None:
        self._open.close()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def cost(self) -> BlockCost:
        kept = sum(self._saved.values())
        return BlockCost(
            kept_bytes={
                KEEP: kept,
                SELECTIVE: self._input_bytes + self._dear.num_bytes,
                FULL: self._input_bytes,
            },
            extra_flops={KEEP: 0, SELECTIVE: 0, FULL: self._flops.get_total_flops()},
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _DearResults(TorchDispatchMode):
    """Adds up the bytes of what is dear to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _DEAR:
            first = result[0] if isinstance(result, tuple) else result
            self.num_bytes += first.nbytes
        return result


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _put(block: torch.nn.Module, mode: str) -> Callable[[], None]:
    """Have `block` run in a mode; return what puts it back."""
    if mode == KEEP:
        return lambda: None
    plain = block.forward
    contexts = functools.partial(_contexts, block, mode)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = forward

    def remove() -> None:
        del block.forward  # the class's own shows again

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
    dear = function in _DEAR
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
