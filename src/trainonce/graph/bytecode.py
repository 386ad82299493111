"""What a code object does and names, read from its bytecode.

Bytecode is what really runs: it has no comments and no line numbers, it is there in notebooks
and for functions made by `exec`, and a file that was edited after its import cannot be mistaken
for it. Docstrings are left out here. It depends on the minor version of Python, which is part of
every action key.
"""

from __future__ import annotations

import dis
import functools
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING

from trainonce.graph.digest import digest

if TYPE_CHECKING:
    from collections.abc import Callable

_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_ATTRIBUTE = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_SKIPPED = frozenset({"CACHE", "PRECALL", "PUSH_NULL", "EXTENDED_ARG", "NOP", "RESUME"})
_OUTER = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"})
# Methods of containers that add to them and tell nothing.
_ADDERS = frozenset({"append", "appendleft", "add", "extend", "update", "put", "put_nowait"})
# Flags that say how the code object is laid out in memory, and whether it has a docstring.
_INCIDENTAL_FLAGS = 0x4000000


@dataclass(frozen=True)
class Reference:
    """A global name and the attributes read from it: `np.random.rand` is np, (random, rand).

    Args:
        name: The global; empty where the root is an imported module.
        attributes: What is read from it, one from another.
        module: The module that a local import names, with `name` empty.
        line: Where, in the file.
        called_without_arguments: It is called at once, with nothing or None in the parentheses.
        is_free: It is a variable of an enclosing function.
    """

    name: str
    attributes: tuple[str, ...]
    module: str = ""
    line: int = 0
    called_without_arguments: bool = False
    is_free: bool = False


@dataclass(frozen=True)
class Body:
    """A code object: the digest of what it does, and what it refers to outside itself.

    `written_only` are names of containers and counters that it adds to and never reads, so that
    what they hold cannot reach its result: `CALLS.append(x)`, `SEEN["a"] += 1`, `count += 1`.
    `attributes` are those that it only adds to in the same way, and those that it reads.
    `reseeds` are lines where some object's `seed()` is called without a number.
    """

    digest: str
    references: tuple[Reference, ...]
    written_only: frozenset[str]
    attributes: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    reseeds: tuple[int, ...] = ()


@functools.lru_cache(maxsize=8192)
def body_of(code: CodeType) -> Body:
    """Return what `code` and the functions within it do and name."""
    references: list[Reference] = []
    _collect(code, {}, references)
    written, read = _uses(code, _OUTER, _is_augmented)
    return Body(
        digest(_normal(code)),
        tuple(references),
        written - read,
        _uses(code, _ATTRIBUTE, _is_augmented_attribute),
        tuple(_reseeds(code)),
    )


def _normal(code: CodeType) -> list[object]:
    """Return the code as plain values, without positions, docstring and file name."""
    instructions = _without_class_positions(code)
    position = {i.offset: number for number, i in enumerate(instructions)}
    body: list[object] = []
    for instruction in instructions:
        argument: object = instruction.argval
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            argument = position.get(instruction.argval, -1)
        elif instruction.opcode in dis.hasconst or isinstance(argument, CodeType):
            argument = _constant(argument)
        elif instruction.opname == "RESUME":
            argument = 0
        elif not isinstance(argument, (str, int, type(None))):
            argument = str(argument)
        body.append((instruction.opname, argument))
    names = (code.co_name, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    return [names, counts, code.co_flags & ~_INCIDENTAL_FLAGS, body, _handlers(code)]


def _without_class_positions(code: CodeType) -> list[dis.Instruction]:
    """Return the instructions, without those that note a class's docstring and line."""
    found = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    noted = [
        number
        for number, i in enumerate(found)
        if i.opname == "STORE_NAME" and i.argval in ("__doc__", "__firstlineno__")
    ]
    dropped = {number for at in noted for number in (at - 1, at)}
    return [i for number, i in enumerate(found) if number not in dropped]


def _handlers(code: CodeType) -> bytes:
    return bytes(getattr(code, "co_exceptiontable", b""))


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return ("code", _normal(value))
    if isinstance(value, tuple):
        return tuple(_constant(item) for item in value)
    return value


def _collect(code: CodeType, imported: dict[str, Reference], out: list[Reference]) -> None:
    """Gather the references of `code`; `imported` maps local names to what they import."""
    imported = dict(imported)
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _SKIPPED]
    line = code.co_firstlineno
    current = Reference("", ())
    extends = False
    for number, instruction in enumerate(instructions):
        line = _line(instruction, line)
        kind, argument = instruction.opname, instruction.argval
        if kind in _GLOBAL:
            out.append(_chain(instructions, number, Reference(str(argument), (), line=line)))
        elif kind == "IMPORT_NAME":
            # `import a.b` yields a, `from a.b import c` yields a.b; both import a.b.
            extends = instructions[number - 1].argval is None
            module = _absolute(str(argument), instructions, number)
            root = module.partition(".")[0] if extends else module
            current = Reference("", (), module=root, line=line)
            out.append(Reference("", ("__name__",), module=module, line=line))
            imported |= _stored(instructions, number, current)
        elif kind == "IMPORT_FROM":
            before = current.attributes if extends else ()
            found = Reference("", (*before, str(argument)), module=current.module, line=line)
            current = found if extends else current
            out.append(found)
            imported |= _stored(instructions, number, found)
        elif kind.startswith(("LOAD_FAST", "LOAD_DEREF")):
            names = argument if isinstance(argument, tuple) else (argument,)
            known = [imported[name] for name in names if name in imported]
            # Where the enclosing function imported a module, the closure holds it.
            known += [
                Reference(name, (), line=line, is_free=True)
                for name in names
                if name in code.co_freevars and name not in imported
            ]
            out.extend(_chain(instructions, number, root, line) for root in known)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _collect(constant, imported, out)


def _uses(
    code: CodeType, kinds: frozenset[str], is_augmented: Callable[[list[dis.Instruction]], bool]
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that are only added to somewhere, and those that are read somewhere.

    Args:
        code: With the functions within it.
        kinds: Which instructions load the names in question.
        is_augmented: Tells whether such an instruction begins `NAME += constant` or the like.
    """
    written: set[str] = set()
    read: set[str] = set()
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "NOP")]
    for number, instruction in enumerate(instructions):
        if instruction.opname in kinds:
            rest = instructions[number:]
            is_addition = _is_statement_call(rest) or is_augmented(rest)
            (written if is_addition else read).add(str(instruction.argval))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_written, inner_read = _uses(constant, kinds, is_augmented)
            written |= inner_written
            read |= inner_read
    return frozenset(written), frozenset(read)


def _is_augmented_attribute(rest: list[dis.Instruction]) -> bool:
    """Tell whether this is `.NAME += constant`."""
    kinds = [i.opname for i in rest[:8] if i.opname not in _SKIPPED]
    stores = [i.argval for i in rest[:8] if i.opname == "STORE_ATTR"]
    if kinds[1:5] != ["LOAD_CONST", "BINARY_OP", "SWAP", "STORE_ATTR"]:
        return False
    return stores[0] == rest[0].argval


def _is_statement_call(rest: list[dis.Instruction]) -> bool:
    """Tell whether this is `NAME.append(...)` or the like, with its result thrown away."""
    if len(rest) < 2 or rest[1].opname not in _ATTRIBUTE or rest[1].argval not in _ADDERS:
        return False
    depth = 1
    for instruction in rest[1:]:
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            return False
        depth += dis.stack_effect(instruction.opcode, instruction.arg)
        if depth <= 0:
            return depth == 0 and instruction.opname == "POP_TOP"
    return False


def _is_augmented(rest: list[dis.Instruction]) -> bool:
    """Tell whether this is `NAME += constant` or `NAME[key] += constant`."""
    kinds = [i.opname for i in rest[:12] if i.opname not in _SKIPPED]
    if len(kinds) > 3 and kinds[1:3] == ["LOAD_CONST", "BINARY_OP"]:
        return kinds[3] in ("STORE_GLOBAL", "STORE_DEREF") and rest[0].argval in (
            i.argval for i in rest[:12] if i.opname == kinds[3]
        )
    return kinds[2:5] == ["COPY", "COPY", "BINARY_SUBSCR"] and kinds[5:10] == [
        "LOAD_CONST", "BINARY_OP", "SWAP", "SWAP", "STORE_SUBSCR",
    ]  # fmt: skip


def _line(instruction: dis.Instruction, before: int) -> int:
    positions = instruction.positions
    return (positions.lineno if positions else None) or before


def _chain(
    instructions: list[dis.Instruction], number: int, root: Reference, line: int = 0
) -> Reference:
    attributes = list(root.attributes)
    number += 1
    while number < len(instructions) and instructions[number].opname in _ATTRIBUTE:
        attributes.append(str(instructions[number].argval))
        number += 1
    following = [(i.opname, i.argval) for i in instructions[number : number + 2]]
    if [op for op, _ in following] == ["LOAD_GLOBAL", "BINARY_SUBSCR"]:
        if following[0][1] == "__name__":
            attributes.append("[__name__]")  # as in `sys.modules[__name__]`
    bare_call = _is_bare_call(instructions[number : number + 3])
    return Reference(
        root.name, tuple(attributes), root.module, line or root.line, bare_call, root.is_free
    )


def _is_bare_call(rest: list[dis.Instruction]) -> bool:
    """Tell whether this is `()`, `(None)` or `(name=None)`."""
    calls = [i for i in rest if i.opname != "KW_NAMES"]
    if calls and calls[0].opname == "CALL":
        return calls[0].arg == 0
    return (
        [i.opname for i in calls[:2]] == ["LOAD_CONST", "CALL"]
        and calls[0].argval is None
        and calls[1].arg == 1
    )


def _reseeds(code: CodeType) -> list[int]:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _SKIPPED]
    found = [
        _line(instruction, code.co_firstlineno)
        for number, instruction in enumerate(instructions)
        if instruction.opname in _ATTRIBUTE
        and instruction.argval == "seed"
        and _is_bare_call(instructions[number + 1 : number + 4])
    ]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _reseeds(constant)
    return found


def _stored(
    instructions: list[dis.Instruction], number: int, found: Reference
) -> dict[str, Reference]:
    """Return the local name that an import is kept under, if it is."""
    for instruction in instructions[number + 1 : number + 4]:
        if instruction.opname in ("STORE_FAST", "STORE_DEREF"):
            return {str(instruction.argval): found}
        if instruction.opname.startswith("STORE_FAST_"):
            return {str(instruction.argval[0]): found}
        if instruction.opname not in ("SWAP", "POP_TOP", "ROT_TWO"):
            break
    return {}


def _absolute(name: str, instructions: list[dis.Instruction], number: int) -> str:
    """Return the import's name, with a dot in front for each level of a relative one."""
    level = instructions[number - 2].argval if number >= 2 else 0
    return "." * level + name if isinstance(level, int) else name
