"""The fingerprint of code: a function and everything of the project that it reaches.

Reached are the functions, classes (with methods and bases), modules and values that a function
names, by global name, attribute, closure, default or local import, and what those reach in
turn. Library code counts by package and version. Where a function can reach things by names
that only exist at run time (`getattr`, a module passed as a value), its whole module counts,
and the modules that one imports; the fingerprint says so.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import threading
import types
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.graph import purity_names
from trainonce.graph.bytecode import Reference, body_of
from trainonce.graph.code_objects import (
    MISSING,
    annotation_text,
    content_of,
    dotted_name,
    field_parts,
    full_name,
    imports_of,
    is_code,
    is_only_added_to,
    module_of,
    qualname_of,
    registry_of,
    resolve_name,
    unwrapped,
    without_docstrings,
)
from trainonce.graph.digest import combine, digest, unhashable
from trainonce.graph.packages import Origin, module_name, origin_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from trainonce.errors import UnhashableError

# Names through which a function reaches what cannot be told beforehand.
_WIDENING = frozenset({"getattr", "globals", "vars", "locals", "attrgetter", "methodcaller"})
_UNDECIDABLE = frozenset({"eval", "exec", "__import__", "import_module", "run_path", "run_module"})
_UNDECIDABLE_ATTRIBUTES = frozenset({"__subclasses__", "__globals__"})
# Attributes of a class that say nothing about what it does.
_CLASS_INCIDENTAL = frozenset({
    "__doc__", "__module__", "__dict__", "__weakref__", "__firstlineno__", "_abc_impl",
    "__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__",
    "__type_params__", "__parameters__", "__match_args__", "__qualname__",
    "__slotnames__",  # kept there by the first copy or pickle of an object
})  # fmt: skip


@dataclass
class Fingerprint:
    """What a function is made of.

    Args:
        digest: Of all parts together.
        parts: What is reached -> digest of its own content; for `why`.
        places: What is reached -> where, as `text.py:14`.
        notes: Where and why a whole module counts.
        impure: Clocks, entropy, environment and unseeded generators that are named.
        seeds: Whether it sets global generators.
    """

    digest: str = ""
    parts: dict[str, str] = field(default_factory=lambda: {})
    places: dict[str, str] = field(default_factory=lambda: {})
    notes: list[str] = field(default_factory=lambda: [])
    impure: list[str] = field(default_factory=lambda: [])
    seeds: bool = False


def fingerprint(value: Any, *, path: str = "code") -> Fingerprint:
    """Return the fingerprint of a function, class or module.

    Raises:
        UnhashableError: Something it reaches has no digest, or cannot be found.
    """
    with _walk_of() as walk:
        root = walk.name_of(value, path)
        walk.run()
    result = walk.result
    result.digest = combine("code", [("root", root), *sorted(result.parts.items())])
    return result


_active = threading.local()


def encode_code(value: Any, path: str) -> str:
    """Return what stands for a piece of code within a digest.

    Within a walk that is its name, since the walk visits it as well; outside, its fingerprint.
    """
    walk: _Walk | None = getattr(_active, "walk", None)
    if walk is not None:
        return walk.name_of(value, path)
    found = fingerprint(value, path=path)
    impure: list[str] | None = getattr(_active, "impure", None)
    if impure is not None:
        impure += found.impure
    return found.digest


@contextmanager
def noting_impure() -> Generator[list[str]]:
    """Note what code in the values that are digested meanwhile names: clocks and the like."""
    before = getattr(_active, "impure", None)
    _active.impure = found = []
    try:
        yield found
    finally:
        _active.impure = before


@contextmanager
def _walk_of() -> Generator[_Walk]:
    walk, before = _Walk(), getattr(_active, "walk", None)
    _active.walk = walk
    try:
        yield walk
    finally:
        _active.walk = before


class _Walk:
    """One traversal: names what it meets, then visits what has not been visited."""

    def __init__(self) -> None:
        self.result = Fingerprint()
        self._names: dict[int, str] = {}
        self._reached: set[str] = set()
        self._queue: deque[tuple[str, Any]] = deque()
        self._live: set[str] = set()
        self._attributes_read: set[str] = set()
        self._attributes_added: set[str] = set()
        self._counters: list[tuple[str, str, Any]] = []
        self._kept: list[Any] = []  # so that no id is given to another object meanwhile

    def run(self) -> None:
        """Visit everything that was named."""
        while self._queue:
            name, value = self._queue.popleft()
            if isinstance(value, types.FunctionType):
                self._function(name, value)
            elif isinstance(value, type):
                self._class(name, value)
            else:
                self._module(name, value)
        self._count_what_is_read()
        self.result.impure += purity_names.combined_reasons(self._reached)
        self.result.seeds = purity_names.seeds_globally(self._reached)

    def name_of(self, value: Any, path: str, *, live: bool = True) -> str:
        """Return the name under which `value` is, or will be, part of the fingerprint.

        Args:
            value: A function, class or module.
            path: How an error names it.
            live: Of a module count also what its globals hold now, whoever set them.
        """
        value = unwrapped(value)
        if live and isinstance(value, types.ModuleType) and value.__name__ not in self._live:
            self._live.add(value.__name__)
            self._globals_of(value, path)
        if id(value) in self._names:
            return self._names[id(value)]
        is_module = isinstance(value, types.ModuleType)
        module = module_name(value.__name__) if is_module else module_of(value)
        full = module if is_module else f"{module}.{qualname_of(value)}"
        origin = origin_of(module)
        if not origin.is_project:
            self._library(origin)
            # Handed on as a value, as a default say, it is called by another name.
            reasons = purity_names.reasons(full, called_without_arguments=False)
            self.result.impure += [f"{reason}, by way of {path}" for reason in reasons]
            return full
        if not isinstance(value, (types.FunctionType, type, types.ModuleType)):
            raise unhashable(path, value, "it is compiled code without a version")
        name, number = full, 2
        while name in self._names.values():
            name, number = f"{full}#{number}", number + 1
        self._names[id(value)] = name
        self._kept.append(value)
        self._queue.append((name, value))
        return name

    def _library(self, origin: Origin) -> None:
        if origin.kind == "package":
            self.result.parts[f"package {origin.package}"] = origin.version

    # -------------------------------------------------------- what is visited

    def _function(self, name: str, function: types.FunctionType) -> None:
        body = body_of(function.__code__)
        place = f"{Path(function.__code__.co_filename).name}:{function.__code__.co_firstlineno}"
        self.result.places[name] = place
        file = Path(function.__code__.co_filename).name
        if implementations := registry_of(function):
            self.result.parts[name] = combine(
                "singledispatch",
                [
                    (full_name(kind), self._value(one, name))
                    for kind, one in implementations.items()
                ],
            )
            return
        added, read = body.attributes
        if reaching := _UNDECIDABLE_ATTRIBUTES & read:
            what = f"{sorted(reaching)[0]} in {place} reaches code"
            raise _undecidable(name, function, what)
        self._attributes_added |= added
        self._attributes_read |= read
        self.result.impure += [f"seed() draws entropy at {file}:{n}" for n in body.reseeds]
        found = [
            ("body", body.digest),
            ("defaults", digest(function.__defaults__, path=f"default of {name}")),
            ("keyword defaults", digest(function.__kwdefaults__, path=f"default of {name}")),
        ]
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if variable in body.written_only and is_only_added_to(content_of(cell)):
                continue
            found.append((f"closure {variable}", self._cell(cell, f"{variable} of {name}")))
        attributes = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
        if attributes:
            found.append(("attributes", self._value(attributes, f"attributes of {name}")))
        self.result.parts[name] = combine("function", found)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for reference in body.references:
            if reference.is_free:
                held = content_of(cells[reference.name]) if reference.name in cells else None
                if isinstance(held, types.ModuleType):
                    where = f"{Path(function.__code__.co_filename).name}:{reference.line}"
                    self._chain(function, held, reference.name, reference, where)
                continue
            value = function.__globals__.get(reference.name)
            if not (reference.name in body.written_only and is_only_added_to(value)):
                self._reference(name, function, reference)

    def _cell(self, cell: types.CellType, path: str) -> str:
        value = content_of(cell)
        return "empty" if value is MISSING else self._value(value, path)

    def _class(self, name: str, cls: type) -> None:
        content: list[tuple[str, str]] = []
        for key, item in sorted(vars(cls).items()):
            if key in _CLASS_INCIDENTAL:
                continue
            if is_only_added_to(item):
                self._counters.append((name, key, item))
            else:
                content.append((key, self._attribute(item, f"{name}.{key}")))
        bases = [self.name_of(base, name) for base in (*cls.__bases__, type(cls))]
        self.result.parts[name] = combine("class", [*content, ("bases", " ".join(bases))])

    def _count_what_is_read(self) -> None:
        """Count the attributes of classes that code does not only add to: no counters of calls."""
        only_added = self._attributes_added - self._attributes_read
        for name, key, item in self._counters:
            if key not in only_added or self.result.notes:
                path = f"{name}.{key}"
                self.result.parts[f"value {path}"] = self._value(item, path)

    def _attribute(self, item: Any, path: str) -> str:
        """Return the digest of one entry of a class's dictionary."""
        if isinstance(item, (staticmethod, classmethod)):
            return f"{type(item).__name__} {self._value(item.__func__, path)}"
        if isinstance(item, property):
            parts = (item.fget, item.fset, item.fdel)
            return " ".join(self._value(part, path) for part in parts)
        if isinstance(item, functools.cached_property):
            return f"cached {self._value(item.func, path)}"
        if isinstance(item, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            return f"slot {item.__name__}"
        if path.endswith(".__annotations__"):
            return digest({key: annotation_text(kind) for key, kind in item.items()})
        if path.endswith(".__dataclass_fields__"):
            return self._value([field_parts(field) for field in item.values()], path)
        if path.endswith(".__dataclass_params__"):
            return repr(item)
        if type(item).__name__ == "_tuplegetter":
            return f"item {item.__reduce__()[1][0]}"
        return self._value(item, path)

    def _module(self, name: str, module: types.ModuleType) -> None:
        """Count a whole module by its source, and the project modules that it imports."""
        file = getattr(module, "__file__", None)
        if not file or not str(file).endswith(".py"):
            raise unhashable(name, module, "its source is not available")
        try:
            tree = ast.parse(Path(file).read_bytes())
        except (OSError, SyntaxError) as error:
            raise unhashable(name, module, f"its source cannot be read: {error}") from error
        self._check_loaded(name, module, Path(file))
        self.result.places[name] = Path(file).name
        self.result.parts[f"module {name}"] = digest(ast.dump(without_docstrings(tree)))
        for imported in sorted(imports_of(tree, module)):
            origin = origin_of(imported)
            if not origin.is_project:
                self._library(origin)
            elif imported in sys.modules:
                self.name_of(sys.modules[imported], name, live=False)

    def _globals_of(self, module: types.ModuleType, where: str) -> None:
        if not origin_of(module.__name__).is_project:
            return
        for key, value in sorted(vars(module).items()):
            if isinstance(value, types.ModuleType):
                self.name_of(value, where, live=False)
            elif not key.startswith("__"):
                self._used(value, f"{module_name(module.__name__)}.{key}", where)

    def _check_loaded(self, name: str, module: types.ModuleType, file: Path) -> None:
        """Refuse a module whose file was edited after this process imported it."""
        compiled = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
        on_disk = {c.co_name: c for c in compiled.co_consts if isinstance(c, types.CodeType)}
        for function in list(vars(module).values()):
            if not isinstance(function, types.FunctionType):
                continue
            loaded = function.__code__
            if loaded.co_filename != str(file) or loaded.co_qualname != loaded.co_name:
                continue
            # pytest rewrites the asserts of test modules in memory.
            rewritten = "@pytest_ar" in loaded.co_names
            found = on_disk.get(loaded.co_name)
            if not rewritten and (found is None or body_of(found).digest != body_of(loaded).digest):
                raise unhashable(name, module, f"{file.name} was edited after it was imported")

    # -------------------------------------------------------- what is named

    def _reference(self, name: str, function: types.FunctionType, reference: Reference) -> None:
        where = f"{Path(function.__code__.co_filename).name}:{reference.line}"
        called = (reference.name, *reference.attributes)[-1]
        if reference.name in _UNDECIDABLE or _UNDECIDABLE.intersection(reference.attributes):
            raise _undecidable(name, function, f"{called}() at {where} runs code")
        if reference.name in _WIDENING or called in ("attrgetter", "methodcaller"):
            # Of these only one reaches what nothing else of the function names: its globals.
            self._widen(function, where, f"{called}()", live=called == "globals")
        if reference.module and reference.attributes == ("__name__",):
            origin = origin_of(resolve_name(reference.module, function.__globals__))
            if not origin.is_project:
                self._library(origin)
                return
        root, dotted = self._root(function, reference)
        if root is MISSING:
            self.result.parts[f"missing {dotted}"] = ""
            return
        self._chain(function, root, dotted, reference, where)

    def _root(self, function: types.FunctionType, reference: Reference) -> tuple[Any, str]:
        scope = function.__globals__
        if reference.module:
            module = resolve_name(reference.module, scope)
            try:
                return importlib.import_module(module), module
            except ImportError:
                return MISSING, module
        if reference.name in scope:
            return scope[reference.name], reference.name
        builtins = scope.get("__builtins__", {})
        table = builtins if isinstance(builtins, dict) else vars(builtins)
        return table.get(reference.name, MISSING), f"builtins.{reference.name}"

    def _chain(
        self, function: types.FunctionType, root: Any, dotted: str, ref: Reference, where: str
    ) -> None:
        """Follow attributes through modules and classes, down to what is used."""
        value, left = root, list(ref.attributes)
        owner: types.ModuleType | None = None
        name = dotted_name(value, dotted)
        while left and isinstance(value, types.ModuleType):
            attribute = left.pop(0)
            name = f"{name}.{attribute}"
            if attribute == "__name__":
                return
            if attribute == "__dict__" and origin_of(value.__name__).is_project:
                self._widen_module(value, where, f"{name}", live=True)
                return
            owner = value
            value = getattr(owner, attribute, sys.modules.get(name, MISSING))
            if value is MISSING:
                self.result.parts[f"missing {name}"] = ""
                return
            name = dotted_name(value, name)
        reached = ".".join([name, *left])
        self._reached.add(reached)
        if reached == "sys.modules.[__name__]":
            self._widen(function, where, "sys.modules[__name__]", live=True)
        elif reached.startswith("sys.modules") or value is sys.modules:
            raise _undecidable(
                full_name(function), function, f"sys.modules at {where} reaches modules"
            )
        bare_call = ref.called_without_arguments
        for reason in purity_names.reasons(reached, called_without_arguments=bare_call):
            self.result.impure.append(f"{reason} at {where}")
        if owner is not None and not (origin := origin_of(owner.__name__)).is_project:
            # What hangs on a library's module changes with its version, whatever it is.
            self._library(origin)
            if not isinstance(value, types.ModuleType):
                return
        if isinstance(value, types.ModuleType) and origin_of(value.__name__).is_project:
            cause = f"the use of module {value.__name__} as a value"
            self._widen_module(value, where, cause, live=True)
            return
        if ref.module or not isinstance(root, types.ModuleType):
            label = f"{module_name(function.__module__)}.{ref.name or name}"
        else:
            label = name
        self._used(value, label, where)

    def _used(self, value: Any, label: str, where: str) -> None:
        if is_code(value):
            self.name_of(value, label)
            return
        self.result.places[f"value {label}"] = where
        self.result.parts[f"value {label}"] = self._value(value, f"{label} (read at {where})")

    def _value(self, value: Any, path: str) -> str:
        if is_code(value):
            return self.name_of(value, path)
        return digest(value, path=path)

    def _widen(self, function: types.FunctionType, where: str, cause: str, *, live: bool) -> None:
        module = sys.modules.get(function.__module__)
        if module is None:
            raise unhashable(function.__module__, function, "its module is gone")
        self._widen_module(module, where, cause, live=live)

    def _widen_module(
        self, module: types.ModuleType, where: str, cause: str, *, live: bool
    ) -> None:
        note = f"all of {module.__name__} counts, because of {cause} at {where}"
        if note not in self.result.notes:
            self.result.notes.append(note)
        self.name_of(module, where, live=live)


def _undecidable(path: str, function: types.FunctionType, what: str) -> UnhashableError:
    how = "by a name that is only known at run time; declare `version=`"
    return unhashable(path, function, f"{what} {how}")
