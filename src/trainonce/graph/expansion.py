"""Expansions: what a function that returned nodes chose, kept so that it need not choose again.

The record names functions and holds arguments. Nodes are made anew from it and looked up under
keys of their own, so that an edited function or file below an expansion counts as ever. What a
function passed on of its own inputs is not stored again: the record refers to the input.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import EncodingError, GraphError
from trainonce.graph import inputs
from trainonce.graph.code_objects import content_of
from trainonce.graph.digest import combine, register
from trainonce.graph.node import Dir, File, Node, NodeFunction

if TYPE_CHECKING:
    from collections.abc import Callable

_FILES = {"File": File, "Dir": Dir}


@dataclass(frozen=True)
class Reference:
    """Stands for a call of the record, or for an input of the node whose function returned it.

    Args:
        kind: "call"; "argument", as a whole; or "input", a node within an argument.
        name: Of the argument.
        number: Of the call, or of the node among those of the argument.
    """

    kind: str
    name: str = ""
    number: int = 0


@dataclass(frozen=True)
class Path:
    """Stands for a file or folder; its content counts when the node made from it is looked up."""

    kind: str
    path: str
    strict: bool


@dataclass(frozen=True)
class Function:
    """Stands for a node function: by "name" in a module, in the "closure", or as "argument"."""

    kind: str
    name: str
    module: str = ""


@dataclass(frozen=True)
class Call:
    """A node: its function and its arguments."""

    function: Function
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Expansion:
    """What a function returned, with references in place of nodes. Calls refer to earlier ones."""

    calls: list[Call]
    result: Any


register(Reference, lambda one: [one.kind, one.name, one.number])
register(Path, lambda one: [one.kind, one.path, one.strict])
register(Function, lambda one: [one.kind, one.name, one.module])
register(Call, lambda one: [one.function, one.arguments])
register(Expansion, lambda one: [one.calls, one.result])


def expansion_key(key: str, node: Node[Any]) -> str:
    """Return what the expansion of a node with this action key is kept under.

    Files count by content in an action key, but what a function returns may name their paths.
    """
    files = [item for item in inputs.find(node.bound.arguments) if isinstance(item, File)]
    paths = [(type(file).__name__, f"{file.strict} {file.path}") for file in files]
    return combine("expansion-1", [("action", key), *paths])


def record(
    node: Node[Any], values: dict[str, Any], result: Any, value_of: Callable[[Node[Any]], Any]
) -> Expansion:
    """Return what describes the nodes in `result`.

    Args:
        node: Whose function returned them.
        values: Its arguments, with values in place of nodes.
        result: What it returned.
        value_of: Returns the value that an input node has in `values`.

    Raises:
        EncodingError: A function or file in it cannot be found again by what a record holds.
    """
    recorder = _Recorder(node)
    recorder.note_inputs(values, value_of)
    return recorder.record(result)


def rebuild(found: Expansion, node: Node[Any]) -> Any:
    """Return what `record` described, with new nodes for the same calls.

    Raises:
        EncodingError: A function is not where it was, or has other parameters.
    """
    made: list[Node[Any]] = []

    def put(part: Any) -> Any:
        if isinstance(part, Path):
            return _FILES[part.kind](part.path, strict=part.strict)
        if isinstance(part, Function):
            return _find(part, node)
        if not isinstance(part, Reference):
            return inputs.KEEP
        if part.kind == "call":
            return made[part.number]
        argument = node.bound.arguments[part.name]
        return argument if part.kind == "argument" else _in_order(argument)[part.number]

    for call in found.calls:
        function = _find(call.function, node)
        if list(call.arguments) != list(function.signature.parameters):
            raise EncodingError(f"{function.name} has other parameters than when it was recorded")
        arguments = OrderedDict((n, inputs.swap(v, put)) for n, v in call.arguments.items())
        made.append(Node(function, inspect.BoundArguments(function.signature, arguments)))
    return inputs.swap(found.result, put)


def nodes_in(value: object) -> list[Node[Any]]:
    """Return the nodes in a value, in the order in which they are found."""
    return [found for found in inputs.find(value) if isinstance(found, Node)]


def inputs_first(value: object, is_known: Callable[[Node[Any]], bool]) -> list[Node[Any]]:
    """Return all nodes in a value and below that are not known yet, inputs before users.

    Raises:
        GraphError: The value contains itself, or is nested too deeply.
    """
    try:
        return _inputs_first(value, is_known)
    except RecursionError:
        raise GraphError(
            "an input contains itself, or is nested too deeply to be searched for nodes",
            hint="pass flat data, such as a list of edges in place of linked objects",
        ) from None


def _inputs_first(value: object, is_known: Callable[[Node[Any]], bool]) -> list[Node[Any]]:
    ordered: dict[int, Node[Any]] = {}
    stack: list[tuple[Node[Any], bool]] = [(n, False) for n in reversed(nodes_in(value))]
    while stack:
        node, has_inputs = stack.pop()
        if id(node) in ordered or is_known(node):
            continue
        if has_inputs:
            ordered[id(node)] = node
        else:
            stack.append((node, True))
            stack += [(n, False) for n in reversed(nodes_in(node.bound.arguments))]
    return list(ordered.values())


class _Recorder:
    """Makes one record; knows by identity what it can refer to."""

    def __init__(self, node: Node[Any]) -> None:
        self._node = node
        self._known: dict[int, Reference] = {}

    def note_inputs(self, values: dict[str, Any], value_of: Callable[[Node[Any]], Any]) -> None:
        """Know the arguments, and the values of the nodes in them.

        Ignored ones are stored: the next call may have another one under the same key.
        """
        declared: set[int] = set()
        for name, argument in self._node.bound.arguments.items():
            declared |= {id(item) for item in inputs.find(argument) if isinstance(item, File)}
            if name in self._node.function.options.ignore:
                continue
            if not _is_small(values[name]):
                self._known[id(values[name])] = Reference("argument", name)
            for number, item in enumerate(_in_order(argument)):
                value = value_of(item)
                if not _is_small(value):
                    self._known.setdefault(id(value), Reference("input", name, number))
        for item in inputs.find(values):
            if id(item) not in declared:
                raise EncodingError(f"{item!r}, which another node gave it, is a path that its "
                                    "key does not show")  # fmt: skip

    def record(self, result: Any) -> Expansion:
        """Return the record of what the function returned."""
        calls: list[Call] = []
        for node in inputs_first(result, lambda node: id(node) in self._known):
            arguments = {n: inputs.swap(v, self._put) for n, v in node.bound.arguments.items()}
            calls.append(Call(self._place_of(node.function), arguments))
            self._known[id(node)] = Reference("call", number=len(calls) - 1)
        return Expansion(calls, inputs.swap(result, self._put))

    def _put(self, part: Any) -> Any:
        if id(part) in self._known:
            return self._known[id(part)]
        if isinstance(part, NodeFunction):
            return self._place_of(part)
        if type(part) in (File, Dir):
            return Path(type(part).__name__, str(part.path), part.strict)
        return inputs.KEEP

    def _place_of(self, function: NodeFunction[..., Any]) -> Function:
        """Return how a function is found again: by its name, or as the node's function found it."""
        node = self._node
        places = [Function("name", function.function.__qualname__, function.module)]
        places += [Function("closure", name) for name in _closure(node)]
        places += [
            Function("argument", name)
            for name in node.bound.arguments
            if name not in node.function.options.ignore
        ]
        for place in places:
            if _held(place, node) is function:
                return place
        raise EncodingError(
            f"{function.name}, a call of which it returned, cannot be found by that name",
            hint="define the function at the top of a module",
        )


def _in_order(argument: Any) -> list[Node[Any]]:
    """Return the nodes of an argument in an order that its digest shows: none of a set."""
    found: list[Node[Any]] = []

    def put(part: Any) -> Any:
        if isinstance(part, Node):
            found.append(part)
        return part if isinstance(part, (Node, set, frozenset)) else inputs.KEEP

    inputs.swap(argument, put)
    return found


def _find(place: Function, node: Node[Any]) -> NodeFunction[..., Any]:
    found = _held(place, node)
    if not isinstance(found, NodeFunction):
        raise EncodingError(f"the node function {place.module}.{place.name} is gone")
    return found


def _held(place: Function, node: Node[Any]) -> Any:
    if place.kind == "closure":
        return _closure(node).get(place.name)
    if place.kind == "argument":
        return node.bound.arguments.get(place.name)
    # Nothing is imported because a store says so. The key has imported what its function reaches.
    found: Any = sys.modules.get(place.module)
    for step in place.name.split("."):
        found = getattr(found, step, None)
    return found


def _closure(node: Node[Any]) -> dict[str, Any]:
    function = node.function.function
    names = function.__code__.co_freevars
    return dict(zip(names, map(content_of, function.__closure__ or ()), strict=True))


def _is_small(value: Any) -> bool:
    """Tell whether a value is rather stored than referred to; the same object may stand for two."""
    if isinstance(value, (str, bytes)):
        return len(value) < 64
    empty = type(value) in (tuple, frozenset) and not value
    return empty or value is None or isinstance(value, (bool, int, float, complex))
