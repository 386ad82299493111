"""Proof that a module treats the rows of a batch one by one.

Storing outputs by sample is right only where row `i` of the output depends on row `i` of the
input and on nothing else in the batch. The proof follows the batch dimension through a graph
exported with a symbolic batch size: for each value it knows at which dimension the rows lie,
and each operator either keeps rows apart or is not known to. An unknown operator proves
nothing; the caller then compares values instead, or refuses.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.export import ExportedProgram


# What `x[:]` is exported as: a slice to the largest integer.
_END = (1 << 63) - 1


@dataclass(frozen=True)
class Lie:
    """Where rows lie: dimension `dim` runs over (outer, batch, mult), merged in this order."""

    dim: int
    mult: int = 1
    outer: int = 1

    def at(self, dim: int) -> Lie:
        """Return the same at another dimension."""
        return replace(self, dim=dim)


Rule: TypeAlias = "Callable[[_Walk, Any, Lie], Lie | None]"


class _UnprovenError(Exception):
    """An operator, or its use, is not known to keep rows apart."""


def unproven(program: ExportedProgram) -> str:
    """Return "" where the program provably treats rows one by one, else what is in the way.

    Args:
        program: Exported with a symbolic size for dimension 0 of its batched inputs, then
            decomposed (`run_decompositions`).
    """
    try:
        _Walk(program).run()
    except _UnprovenError as error:
        return str(error)
    return ""


class _Walk:
    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.lies: dict[Node, Lie] = {}
        self.batch: Any = None

    def run(self) -> None:
        user_inputs = set(self.program.graph_signature.user_inputs)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in user_inputs:
                    self._input(node)
            elif node.op == "call_function":
                lie = self._call(node)
                if lie is not None:
                    self.lies[node] = lie
            elif node.op == "get_attr":
                raise _UnprovenError(f"nested graph {node.target}")
            else:
                self._outputs(node)

    # ------------------------------------------------------------ ends

    def _input(self, node: Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return
        if value.ndim == 0 or not _is_free(value.shape[0]):
            raise _UnprovenError(f"input {node.name} has no free batch dimension")
        symbol = _expression(value.shape[0])
        if self.batch is not None and symbol != self.batch:
            raise _UnprovenError("inputs have batch dimensions of their own")
        self.batch = symbol
        self.lies[node] = Lie(0)

    def _outputs(self, node: Node) -> None:
        names = set(self.program.graph_signature.user_outputs)
        for value in node.all_input_nodes:
            if value.name in names and self.lies.get(value) != Lie(0):
                raise _UnprovenError(f"output {value.name} does not hold one entry a row")

    # ------------------------------------------------------------ operators

    def _call(self, node: Node) -> Lie | None:
        tensors = [source for source in node.all_input_nodes if source in self.lies]
        name = _name(node)
        if not tensors:
            return self._made(node, name)
        if node.target is operator.getitem:
            lie = self.lies[tensors[0]]
        else:
            if name not in _SHAPED and any(_is_size(source) for source in node.all_input_nodes):
                raise _UnprovenError(f"{name} reads the batch size")
            if name in ("aten.sym_size", "aten.sym_numel", "aten._assert_tensor_metadata"):
                return None
            rule = _RULES.get(name)
            if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                rule = _pointwise
            lie = rule(self, node, self.lies[tensors[0]]) if rule else None
        if lie is None:
            raise _UnprovenError(f"{name} may mix rows")
        self._check(node, lie, name)
        return lie

    def _made(self, node: Node, name: str) -> Lie | None:
        """A value that no batched input entered; its shape may still hold the batch size."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        dims = [dim for dim, size in enumerate(value.shape) if _is_free(size)]
        if not dims:
            if any(_is_size(source) for source in node.all_input_nodes):
                raise _UnprovenError(f"{name} reads the batch size")
            return None
        if len(dims) > 1 or name not in ("aten.full", "aten.expand"):
            raise _UnprovenError(f"{name} makes values by position in the batch")
        lie = Lie(dims[0], self.mult(value.shape[dims[0]]))
        return lie

    def _check(self, node: Node, lie: Lie, name: str) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            fits = lie.dim < value.ndim and (
                self.mult(value.shape[lie.dim]) == lie.mult * lie.outer
            )
            others = any(_is_free(size) for dim, size in enumerate(value.shape) if dim != lie.dim)
            if not fits or others:
                raise _UnprovenError(f"{name} moves rows in a way that is not followed")

    def mult(self, size: Any) -> int:
        """How many entries a row has along a dimension of this size; 0 where unclear."""
        if isinstance(size, int) or self.batch is None:
            return 0
        ratio = _expression(size) / self.batch
        return int(ratio) if ratio.is_Integer else 0

    def unbatched(self, *values: object) -> bool:
        return not any(isinstance(value, Node) and value in self.lies for value in values)


def _name(node: Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


def _expression(size: Any) -> Any:
    return size.node.expr


def _is_free(size: Any) -> bool:
    """Tell whether a dimension's size is a symbol, as the batch's is."""
    return isinstance(size, torch.SymInt)


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _ndim(node: Any) -> int:
    return node.meta["val"].ndim


# ---------------------------------------------------------------- rules


def _pointwise(walk: _Walk, node: Any, _: Lie) -> Lie | None:
    """Rows stay where they are; what is broadcast onto them is the same for all."""
    ndim = _ndim(node)
    found: Lie | None = None
    plain: list[Node] = []
    for source in node.all_input_nodes:
        if source not in walk.lies:
            plain.append(source)
            continue
        lie = walk.lies[source]
        aligned = lie.at(lie.dim + ndim - _ndim(source))
        if found not in (None, aligned):
            return None
        found = aligned
    for source in plain:
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor) and found is not None:
            dim = found.dim - (ndim - value.ndim)
            if dim >= 0 and value.shape[dim] != 1:
                return None
    return found


def _same(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    return lie if walk.unbatched(*node.args[1:]) else None


def _rows_first(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    """The first argument's rows lie at dimension 0, the others are weights."""
    keeps = node.args[0] in walk.lies and walk.unbatched(*node.args[1:])
    return lie if keeps and lie.dim == 0 else None


def _addmm(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    bias, left, right = node.args[:3]
    return _product(walk, left, right) if walk.unbatched(bias) and _ndim(bias) == 1 else None


def _mm(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    return _product(walk, *node.args[:2])


def _product(walk: _Walk, left: Any, right: Any) -> Lie | None:
    """Rows of the left matrix times a weight."""
    lie = walk.lies.get(left)
    return lie if lie is not None and lie.dim == 0 and walk.unbatched(right) else None


def _bmm(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    left, right = (walk.lies.get(argument) for argument in node.args[:2])  # type: ignore[arg-type]
    if left is not None and left == right and left.dim == 0:
        return left
    return left if left is not None and right is None and left.dim == 1 else None


def _layer_norm(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    shape: Any = node.args[1]
    keeps = lie.dim < _ndim(node.args[0]) - len(shape) and walk.unbatched(*node.args[2:])
    return lie if keeps else None


def _along(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    """An operator along one dimension that keeps the shape's order: softmax, cumsum, slice."""
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    return lie if dim % _ndim(node.args[0]) != lie.dim and walk.unbatched(*node.args[1:]) else None


def _slice(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    whole = not start and (end is None or end == _END) and step == 1
    elsewhere = isinstance(dim, int) and dim % _ndim(node.args[0]) != lie.dim
    fixed = all(value is None or isinstance(value, int) for value in (start, end, step))
    return lie if fixed and (whole or elsewhere) else None


def _split(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    dim: Any = node.args[2] if len(node.args) > 2 else 0
    return lie if dim % _ndim(node.args[0]) != lie.dim else None


def _reduce(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    ndim = _ndim(node.args[0])
    reduced = {dim % ndim for dim in dims}
    if lie.dim in reduced:
        return None
    value = node.meta["val"]
    out = value[0] if isinstance(value, (tuple, list)) else value
    gone = 0 if out.ndim == ndim else sum(dim < lie.dim for dim in reduced)
    return lie.at(lie.dim - gone)


def _permute(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    dims: Any = node.args[1]
    ndim = _ndim(node.args[0])
    return lie.at([dim % ndim for dim in dims].index(lie.dim))


def _view(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    before = _shape(node.args[0])[: lie.dim]
    after = _shape(node)
    dims = [dim for dim, size in enumerate(after) if _is_free(size)]
    if len(dims) != 1 or not all(isinstance(size, int) for size in before):
        return None
    # How many entries lie before a row's, counted over all dimensions, does not change.
    outer, rest = divmod(math.prod(before) * lie.outer, math.prod(after[: dims[0]]) or 1)
    mult, odd = divmod(walk.mult(after[dims[0]]), outer or 1)
    return None if rest or odd or not mult else Lie(dims[0], mult, outer)


def _expand(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    return lie.at(lie.dim + _ndim(node) - _ndim(node.args[0]))


def _unsqueeze(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    dim: Any = node.args[1]
    return lie.at(lie.dim + (dim % _ndim(node) <= lie.dim))


def _squeeze(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    dims: Any = node.args[1]
    ndim = _ndim(node.args[0])
    shape = _shape(node.args[0])
    gone = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    gone = {dim for dim in gone if isinstance(shape[dim], int) and shape[dim] == 1}
    return None if lie.dim in gone else lie.at(lie.dim - sum(d < lie.dim for d in gone))


def _select(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    dim: Any = node.args[1]
    dim %= _ndim(node.args[0])
    return None if dim == lie.dim else lie.at(lie.dim - (dim < lie.dim))


def _cat(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    alike = all(walk.lies.get(part) == lie for part in parts)
    return lie if alike and dim % _ndim(parts[0]) != lie.dim else None


def _pad(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    pads: Any = node.args[1]
    return lie if lie.dim < _ndim(node.args[0]) - len(pads) // 2 else None


def _embedding(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    weight, indices = node.args[:2]
    return walk.lies.get(indices) if walk.unbatched(weight) else None  # type: ignore[arg-type]


def _attention(walk: _Walk, node: Any, lie: Lie) -> Lie | None:
    queries: Any = node.args[:3]
    others: Iterable[Any] = [*node.args[3:], *node.kwargs.values()]
    alike = all(walk.lies.get(argument) == Lie(0) for argument in queries)
    return Lie(0) if alike and walk.unbatched(*others) else None


_RULES: dict[str, Rule] = {
    "aten.clone": _same,
    "aten.alias": _same,
    "aten.detach": _same,
    "aten.full_like": _same,
    "aten.zeros_like": _same,
    "aten.ones_like": _same,
    "aten._to_copy": _same,
    "aten.convolution": _rows_first,
    "aten._native_batch_norm_legit_no_training": _rows_first,
    "aten.native_group_norm": _rows_first,
    "aten.max_pool2d_with_indices": _rows_first,
    "aten.max_pool3d_with_indices": _rows_first,
    "aten.avg_pool1d": _rows_first,
    "aten.avg_pool2d": _rows_first,
    "aten.avg_pool3d": _rows_first,
    "aten._adaptive_avg_pool2d": _rows_first,
    "aten._adaptive_avg_pool3d": _rows_first,
    "aten.upsample_nearest2d": _rows_first,
    "aten.upsample_bilinear2d": _rows_first,
    "aten.addmm": _addmm,
    "aten.mm": _mm,
    "aten.bmm": _bmm,
    "aten.native_layer_norm": _layer_norm,
    "aten._softmax": _along,
    "aten._log_softmax": _along,
    "aten.cumsum": _along,
    "aten.slice": _slice,
    "aten.topk": _split,
    "aten.split_with_sizes": _split,
    "aten.sum": _reduce,
    "aten.mean": _reduce,
    "aten.amax": _reduce,
    "aten.amin": _reduce,
    "aten.max": _reduce,
    "aten.min": _reduce,
    "aten.var": _reduce,
    "aten.argmax": _reduce,
    "aten.argmin": _reduce,
    "aten.any": _reduce,
    "aten.prod": _reduce,
    "aten.permute": _permute,
    "aten.view": _view,
    "aten._unsafe_view": _view,
    "aten.reshape": _view,
    "aten.expand": _expand,
    "aten.unsqueeze": _unsqueeze,
    "aten.squeeze": _squeeze,
    "aten.select": _select,
    "aten.cat": _cat,
    "aten.constant_pad_nd": _pad,
    "aten.embedding": _embedding,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_attention_math": _attention,
}
# Operators that may take the batch size as an argument: it only shapes their result.
_SHAPED = frozenset(
    {"aten.view", "aten._unsafe_view", "aten.reshape", "aten.expand", "aten.full",
     "aten.native_group_norm", "aten.slice"}
)  # fmt: skip
