"""Where a model can be cut: the frozen prefix of its exported graph, and the rest.

A value is frozen if it is computed from the inputs and from parameters that take no gradient,
by operators that draw no random number and change no buffer. The prefix is all frozen values;
what the rest of the model needs of it is stored by sample. The prefix is then exported again,
alone, and proven pure and row by row on core operators before anything is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from trainonce.errors import DataError
from trainonce.graph.features.fingerprint import Fingerprint, fingerprint
from trainonce.graph.features.graphs import export

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Plan:
    """A model cut in two, for one mode and one set of frozen parameters.

    Args:
        prefix: Computes the stored values from the flat inputs, as a dict by name.
        suffix: Computes the model's outputs from stored values and flat inputs.
        fingerprint: Of the prefix.
        inputs: Which of the flat inputs the prefix reads.
        where: The cut in words.
    """

    prefix: Prefix
    suffix: Suffix
    fingerprint: Fingerprint
    inputs: tuple[int, ...]
    where: str


def find_cut(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    storage_dtype: torch.dtype | None = None,
) -> tuple[Plan | None, str]:
    """Cut `model` where its frozen part ends; return the plan, or None and the reason.

    Args:
        model: In the mode in which it is about to be called.
        args: The arguments it is called with: a batch of at least 2 rows.
        kwargs: The same, by name.
        storage_dtype: What floating-point values are stored as; part of the digest.
    """
    if any(_has_hooks(part) for part in model.modules()):
        return None, "a module has forward hooks, which a graph would not call"
    try:
        program = export(model, args, kwargs)
    except Exception as error:
        return None, f"torch.export: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    body = _Body(model, program)
    try:
        frozen = body.frozen()
    except DataError as error:
        return None, error.message
    stored = body.frontier(frozen)
    if not stored:
        return None, body.reason or "nothing in it is frozen before the first trainable layer"
    prefix = Prefix(body, [node for node in body.nodes if node in frozen], stored)
    flat, spec = tree_flatten((args, dict(kwargs)))
    inputs = tuple(i for i, node in enumerate(body.inputs) if node in prefix.reads)
    if not inputs:
        return None, "its frozen part does not depend on the inputs"
    try:
        named = fingerprint(prefix, tuple(flat), storage_dtype=storage_dtype)
    except DataError as error:
        return None, error.message
    if named.facts.unproven:
        return None, f"rows are not proven independent: {named.facts.unproven}"
    suffix = Suffix(body, stored, spec)
    where = (
        f"after {', '.join(_where(node) for node in stored)}: "
        f"{len(prefix.steps)} of {len(body.calls())} operators are served from rows"
    )
    return Plan(prefix, suffix, named, inputs, where), ""


class _Body:
    """The graph of a model, with its state found in the model itself."""

    def __init__(self, model: torch.nn.Module, program: ExportedProgram) -> None:
        self.model = model
        self.program = program
        self.nodes: list[Node] = list(program.graph.nodes)
        self.state: dict[Node, str] = {}
        self.constants: dict[Node, Any] = {}
        self.inputs: list[Node] = []
        self.reason = ""
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in self.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.state[node] = str(spec.target)
            elif spec.kind is InputKind.USER_INPUT:
                self.inputs.append(node)
            else:
                self.constants[node] = program.constants[str(spec.target)]

    def calls(self) -> list[Node]:
        return [node for node in self.nodes if node.op == "call_function"]

    def fetch(self, node: Node) -> Any:
        """Return the present value of a parameter, buffer or constant."""
        name = self.state.get(node)
        if name is None:
            return self.constants[node]
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)

    def frozen(self) -> set[Node]:
        """Return all values that are the same at every epoch.

        Raises:
            DataError: An operator changes a value in place that others see.
        """
        frozen: set[Node] = set(self.constants)
        for node in self.nodes:
            if node in self.state:
                if not self.fetch(node).requires_grad:
                    frozen.add(node)
            elif node in self.inputs:
                value = node.meta.get("val")
                if not (isinstance(value, torch.Tensor) and value.requires_grad):
                    frozen.add(node)
            elif node.op == "call_function":
                target = self._changed(node)
                if target is not None and target not in self.state:
                    self._check_in_place(node, target)
                elif target is not None:
                    # It writes a buffer: neither it nor a reader of that buffer is frozen.
                    frozen.discard(target)
                    self._note(node, f"changes buffer {self.state[target]}")
                    continue
                if not all(source in frozen for source in node.all_input_nodes):
                    continue
                why = _impure(node)
                if why:
                    self._note(node, why)
                    continue
                frozen.add(node)
        return frozen

    def frontier(self, frozen: set[Node]) -> list[Node]:
        """Return the frozen values that the rest needs and that have a row for each sample."""
        found: list[Node] = []
        for node in self.nodes:
            if node not in frozen or node.op != "call_function":
                continue
            value = node.meta.get("val")
            wanted = any(user not in frozen for user in node.users)
            if wanted and isinstance(value, torch.Tensor) and value.ndim:
                if isinstance(value.shape[0], torch.SymInt) and self._computed(node, frozen):
                    found.append(node)
        return found

    def _computed(self, node: Node, frozen: set[Node]) -> bool:
        """Tell whether a value took parameters to compute: copying inputs is not worth a row."""
        seen: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current in self.state:
                return True
            if current not in seen:
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return False

    def _changed(self, node: Node) -> Node | None:
        """Return the value that an operator changes in place, or None."""
        target: Any = node.target
        name = str(target)
        if name.startswith("aten.batch_norm") and node.args[5]:
            return node.args[3] if isinstance(node.args[3], Node) else None
        schema = getattr(target, "_schema", None)
        if schema is None or not schema.is_mutable:
            return None
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                return value if isinstance(value, Node) else None
        return None

    def _check_in_place(self, node: Node, target: Node) -> None:
        schema = getattr(target.target, "_schema", None)
        is_view = schema is not None and any(
            value.alias_info is not None for value in schema.returns
        ) and not schema.is_mutable  # fmt: skip
        if is_view or len(target.users) > 1 or target in self.inputs:
            raise DataError(
                f"{_where(node)} changes in place what others read ({node.target})",
                hint="use the operator that returns a new tensor",
            )

    def _note(self, node: Node, why: str) -> None:
        self.reason = self.reason or f"{_where(node)} {why}"


class _Part(torch.nn.Module):
    """Some nodes of a graph, run one by one with the model's own parameters."""

    def __init__(self, body: _Body, steps: Iterable[Node]) -> None:
        super().__init__()
        self.model = body.model
        self.training = body.model.training
        self._body = body
        self.steps = list(steps)
        self.reads = {source for node in self.steps for source in node.all_input_nodes}

    def run_nodes(self, known: dict[Node, Any], flat: tuple[Any, ...]) -> dict[Node, Any]:
        """Evaluate the steps, given some values and the model's flat inputs."""
        values = dict(known)
        values.update(zip(self._body.inputs, flat, strict=True))
        for source in self.reads:
            if source in self._body.state or source in self._body.constants:
                values[source] = self._body.fetch(source)
        for node in self.steps:
            args, kwargs = map_arg((node.args, node.kwargs), lambda source: values[source])
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        return values


class Prefix(_Part):
    """The frozen part: from the model's flat inputs to what is stored."""

    def __init__(self, body: _Body, frozen: list[Node], stored: list[Node]) -> None:
        needed = _needed(stored, set())
        super().__init__(
            body, [node for node in frozen if node.op == "call_function" and node in needed]
        )
        self._stored = stored

    def forward(self, *flat: Any) -> dict[str, torch.Tensor]:
        """Return the values to store, by place."""
        values = self.run_nodes({}, flat)
        return {str(place): values[node] for place, node in enumerate(self._stored)}


class Suffix(_Part):
    """The rest: from stored values and flat inputs to the model's outputs."""

    def __init__(self, body: _Body, stored: list[Node], spec: TreeSpec) -> None:
        output = body.nodes[-1]
        # What only has an effect (a buffer's update) is needed too.
        effects = [node for node in body.calls() if body._changed(node) is not None]
        needed = _needed([output, *(node for node in effects if node not in stored)], set(stored))
        super().__init__(
            body,
            [node for node in body.calls() if node in needed and node not in stored],
        )
        self.spec = spec
        self._stored = stored
        self._outputs = output.args[0]
        out_spec = body.program.call_spec.out_spec
        assert out_spec is not None
        self._out_spec = out_spec

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype in which the model computes each stored value."""
        return {str(i): node.meta["val"].dtype for i, node in enumerate(self._stored)}

    def forward(self, stored: Mapping[str, torch.Tensor], flat: tuple[Any, ...]) -> Any:
        """Return what the model would return."""
        known = {node: stored[str(place)] for place, node in enumerate(self._stored)}
        values = self.run_nodes(known, flat)
        found: Any = map_arg(self._outputs, lambda node: values[node])
        return tree_unflatten(list(found), self._out_spec)


def _needed(ends: Iterable[Node], stops: set[Node]) -> set[Node]:
    """Return the nodes that `ends` depend on, themselves included, not looking past `stops`."""
    needed: set[Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in stops:
                stack.extend(node.all_input_nodes)
    return needed


def _impure(node: Node) -> str:
    """Return why an operator's result is not the same at every epoch, or ""."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return ""
    target: Any = node.target
    schema = target._schema
    given = {
        argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)
    }
    given.update(node.kwargs)
    if given.get("train") is False or given.get("training") is False:
        return ""
    if "dropout_p" in {argument.name for argument in schema.arguments}:
        if given.get("dropout_p", 0.0) == 0.0:
            return ""
    return f"draws random numbers ({target})"


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _where(node: Node) -> str:
    """Return the path of the module that a node belongs to, and its operator."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    return f"{paths[-1].removeprefix('L__self___')} ({name})" if paths else name
