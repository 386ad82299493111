"""Counting floating-point operations, and formulas for what torch's own counter misses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")
Shape = tuple[int, ...]


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of `softmax(Q Kᵀ) V`; a causal mask is not discounted.

    torch counts its CUDA kernels the same way, so figures of both devices compare.

    Args:
        query: Shape (batch, heads, query length, head dim).
        key: Shape (batch, key heads, key length, head dim).
        value: Shape (batch, key heads, key length, value dim).
    """
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[-2] * (dim + value[-1])


def attention_backward_flops(
    _grad_out: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    """Return the FLOPs of attention's backward: scores again, then dV, dP, dQ and dK."""
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[-2] * (3 * dim + 2 * value[-1])


# torch 2.13 counts zero for these: its registry lists the CUDA kernels only.
FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(function: Callable[[], T]) -> tuple[T, int]:
    """Call `function`; return its value and the FLOPs of the tensor operations within.

    Matrix products, convolutions and attention are counted, forward and backward, on any
    device; element-wise work is not. Values are what they are without counting.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        value = function()
    return value, counter.get_total_flops()


class FlopCache:
    """Counts a piece of work when it is first done, and knows it from then on.

    Counting slows a step down several times, and steps of equal shapes cost the same.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def call(self, key: Hashable, function: Callable[[], T]) -> tuple[T, int]:
        """Call `function` once; return its value and its FLOPs.

        Args:
            key: Equal for calls that do the same work: shapes, and what is switched on.
            function: A whole step, say.
        """
        if key in self._known:
            return function(), self._known[key]
        value, self._known[key] = count_flops(function)
        return value, self._known[key]
