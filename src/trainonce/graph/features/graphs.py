"""What a module computes, as a digest: its exported graph, and proofs about it.

The graph comes from `torch.export`, decomposed to core operators; the digest covers each
operator, how values flow between them, their dtypes and shapes. Names of attributes do not
count, and neither do parameters that nothing reads. `torch.fx` serves where export fails; its
leaves count by their class and settings.
"""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from trainonce.errors import UnhashableError
from trainonce.graph.digest import digest
from trainonce.graph.features import rowwise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

_SYMBOL = re.compile(r"\b[a-z]+\d+\b")


@dataclass(frozen=True)
class GraphFacts:
    """What is known about a module's graph; plain values, so that it can be kept.

    Args:
        digest: Of operators, topology, dtypes, shapes and constants.
        how: "export" or "fx".
        state: Names of the parameters and buffers it reads, in the graph's order.
        refusal: Why its outputs cannot be stored, or "".
        unproven: Why rows are not known to be independent of each other, or "".
    """

    digest: str
    how: str
    state: tuple[str, ...]
    refusal: str = ""
    unproven: str = ""


def trace(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    free_dims: bool = False,
) -> tuple[GraphFacts | None, str]:
    """Return the facts about `module` called with these arguments, or None and the reason.

    Args:
        module: In the mode in which it will be called.
        args: Example batch; dimension 0 of each tensor is the batch, at least 2 rows.
        kwargs: The same, by name.
        free_dims: Other dimensions differ from batch to batch too.
    """
    try:
        program = export(module, args, kwargs, free_dims=free_dims)
        return _from_export(program), ""
    except UnhashableError as error:
        failed = error.message
    except Exception as error:
        failed = f"torch.export: {type(error).__name__}: {_first_line(error)}"
    try:
        return _from_fx(module, args, kwargs, failed), ""
    except UnhashableError as error:
        return None, f"{failed}; torch.fx: {error.message}"
    except Exception as error:
        return None, f"{failed}; torch.fx: {type(error).__name__}: {_first_line(error)}"


def export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    free_dims: bool = False,
) -> ExportedProgram:
    """Export `module` with a batch dimension that is free where the module leaves it free."""
    shapes = _dynamic_shapes(module, args, kwargs, free_dims)
    with warnings.catch_warnings(), torch.no_grad():
        # Deprecations within torch.export are not the caller's.
        warnings.simplefilter("ignore")
        return torch.export.export(module, args, dict(kwargs), dynamic_shapes=shapes, strict=False)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Return the program in core operators, without mutation of its inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.run_decompositions()


def _dynamic_shapes(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], free_dims: bool
) -> dict[str, Any]:
    def dims(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            count = value.ndim if free_dims else min(1, value.ndim)
            return dict.fromkeys(range(count), torch.export.Dim.AUTO)
        if isinstance(value, dict):
            return {key: dims(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(dims(item) for item in value)
        return None

    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: dims(value) for name, value in bound.items()}


def _from_export(program: ExportedProgram) -> GraphFacts:
    refusal = _mutations(program)
    core = decompose(program)
    refusal = refusal or _mutations(core) or _random(core.graph_module)
    used = {node.name for node in core.graph.nodes if node.op == "placeholder" and node.users}
    state: list[str] = []
    constants: list[object] = []
    for spec in core.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind is InputKind.USER_INPUT or name not in used:
            continue
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            state.append(str(spec.target))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants.append(core.constants[str(spec.target)])
        else:
            raise UnhashableError(f"the graph holds {spec.kind.name.lower()} {spec.target!r}")
    encoded = _Canonical(core).encode()
    named = digest(("export", encoded, constants))
    unproven = "" if refusal else rowwise.unproven(core)
    return GraphFacts(named, "export", tuple(state), refusal, unproven)


def _mutations(program: ExportedProgram) -> str:
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values()]
    if not changed:
        return ""
    names = ", ".join(sorted(set(changed))[:3])
    return f"it changes its buffers when called ({names}): call .eval() on it first"


def _random(graph_module: GraphModule) -> str:
    """Return which operator draws random numbers, or ""."""
    for inner in graph_module.modules():
        for node in inner.graph.nodes if isinstance(inner, GraphModule) else ():
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                return f"it draws random numbers ({node.target}): call .eval() on it first"
    return ""


class _Canonical:
    """The graph as plain values in which no name of the source is left."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._symbols: dict[str, str] = {}

    def encode(self) -> list[object]:
        nodes = self._graph(self._program.graph_module)
        ranges = {
            self._named(str(symbol)): str(bounds)
            for symbol, bounds in self._program.range_constraints.items()
        }
        specs = (self._program.call_spec.in_spec, self._program.call_spec.out_spec)
        return [nodes, sorted(ranges.items()), *(str(spec) for spec in specs)]

    def _graph(self, graph_module: GraphModule) -> list[object]:
        places: dict[Node, int] = {}
        nodes: list[object] = []
        for node in graph_module.graph.nodes:
            if node.op == "placeholder" and not node.users:
                continue
            places[node] = len(places)
            if node.op == "get_attr":
                target: object = self._attribute(graph_module, str(node.target))
            else:
                target = str(node.target) if node.op == "call_function" else ""
            arguments = self._plain((node.args, dict(node.kwargs)), places)
            nodes.append((node.op, target, arguments, self._meta(node.meta.get("val"))))
        return nodes

    def _attribute(self, owner: GraphModule, name: str) -> object:
        value: Any = owner
        for part in name.split("."):
            value = getattr(value, part)
        return self._graph(value) if isinstance(value, GraphModule) else value

    def _plain(self, value: object, places: dict[Node, int]) -> object:
        if isinstance(value, Node):
            return ("%", places[value])
        if isinstance(value, (list, tuple)):
            return [self._plain(item, places) for item in value]
        if isinstance(value, dict):
            return [(str(key), self._plain(item, places)) for key, item in sorted(value.items())]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return ("symbol", self._named(str(value)))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, torch.device):
            return value.type
        raise UnhashableError(f"the graph holds a {type(value).__qualname__} as an argument")

    def _meta(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return (str(value.dtype), [self._named(str(size)) for size in value.shape])
        if isinstance(value, (list, tuple)):
            return [self._meta(item) for item in value]
        return self._named(str(value)) if value is not None else None

    def _named(self, text: str) -> str:
        """Name free sizes by their order: torch numbers them by the names of inputs."""
        return _SYMBOL.sub(
            lambda match: self._symbols.setdefault(match[0], f"d{len(self._symbols)}"), text
        )


# ---------------------------------------------------------------- torch.fx


def _from_fx(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], failed: str
) -> GraphFacts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.fx.symbolic_trace(module)
    places: dict[Node, int] = {}
    nodes: list[object] = []
    state: list[str] = []
    refusal = ""
    for node in traced.graph.nodes:
        places[node] = len(places)
        target: object = ""
        if node.op == "call_module":
            leaf = traced.get_submodule(str(node.target))
            refusal = refusal or _leaf_refusal(str(node.target), leaf)
            target = digest(settings_of(leaf))
            state += [f"{node.target}.{name}" for name, _ in _tensors(leaf)]
        elif node.op == "get_attr":
            state.append(str(node.target))
        elif node.op == "call_function":
            target = digest(node.target)
            refusal = refusal or _function_refusal(node)
        elif node.op == "call_method":
            target = str(node.target)
        nodes.append((node.op, target, _fx_plain((node.args, dict(node.kwargs)), places)))
    specs = [
        (str(value.dtype), list(value.shape[1:]))
        for value in tree_leaves((args, kwargs))
        if isinstance(value, torch.Tensor)
    ]
    named = digest(("fx", nodes, specs))
    return GraphFacts(named, "fx", tuple(dict.fromkeys(state)), refusal, f"no export ({failed})")


def settings_of(module: torch.nn.Module) -> object:
    """Return plain values for everything in `module` but the values of its tensors."""
    # A copy whose tensors are described; the original is left alone.
    described = {
        name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in _tensors(module)
    }
    attributes = [
        (
            path,
            type(part),
            {
                name: value
                for name, value in sorted(vars(part).items())
                if name not in ("_parameters", "_buffers", "_modules", "_compiled_call_impl")
                and not (name.endswith("_hooks") or "_hooks_" in name)
            },
            [
                list(value.values())
                for name, value in sorted(vars(part).items())
                if (name.endswith("_hooks") or "_hooks_" in name) and isinstance(value, dict)
            ],
        )
        for path, part in module.named_modules(remove_duplicate=False)
    ]
    return (described, attributes)


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _leaf_refusal(name: str, leaf: torch.nn.Module) -> str:
    if not leaf.training:
        return ""
    kind = type(leaf).__name__
    if "Dropout" in kind or kind == "RReLU" or float(getattr(leaf, "dropout", 0.0) or 0.0) > 0:
        return f"{name} ({kind}) draws random numbers: call .eval() on it first"
    if getattr(leaf, "track_running_stats", False):
        return f"{name} ({kind}) changes its buffers: call .eval() on it first"
    return ""


def _function_refusal(node: Node) -> str:
    name = getattr(node.target, "__name__", "")
    drawn = name.startswith(("rand", "bernoulli", "multinomial", "normal"))
    dropped = "dropout" in name and node.kwargs.get("training", True)
    return f"it draws random numbers ({name})" if drawn or dropped else ""


def _fx_plain(value: object, places: dict[Node, int]) -> object:
    if isinstance(value, Node):
        return ("%", places[value])
    if isinstance(value, (list, tuple)):
        return [_fx_plain(item, places) for item in value]
    if isinstance(value, dict):
        return [(str(key), _fx_plain(item, places)) for key, item in sorted(value.items())]
    if isinstance(value, slice):
        return ("slice", _fx_plain((value.start, value.stop, value.step), places))
    return value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
