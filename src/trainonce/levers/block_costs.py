"""What the blocks of a model keep for the backward pass, and what it costs not to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trainonce.errors import ConfigError
from trainonce.levers.batches import tensors
from trainonce.levers.flops import FORMULAS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KEEP, SELECTIVE, FULL = "keep", "selective", "full"
_aten = torch.ops.aten
# What is dear to compute a second time: these results are kept where recomputing is selective.
DEAR = {
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
        if func in DEAR:
            first = result[0] if isinstance(result, tuple) else result
            self.num_bytes += first.nbytes
        return result


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
