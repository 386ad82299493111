"""What functions, classes and modules are called, hold and import, for the fingerprint of code."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import queue
import sys
import types
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Any

from trainonce.graph.packages import module_name, origin_of

if TYPE_CHECKING:
    import dataclasses

MISSING: Any = object()


def content_of(cell: types.CellType) -> Any:
    """Return what a cell of a closure holds; `MISSING` where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def registry_of(function: types.FunctionType) -> dict[type, Any]:
    """Return the implementations of a function made by `functools.singledispatch`, or none."""
    registry = vars(function).get("registry")
    if function.__code__.co_filename != functools.__file__ or registry is None:
        return {}
    return dict(registry)


def full_name(value: Any) -> str:
    """Return module and qualified name of a class or function."""
    return f"{module_name(value.__module__)}.{value.__qualname__}"


def is_only_added_to(value: Any) -> bool:
    """Tell whether adding to `value` is all that its methods and operators for it can do."""
    return type(value) in (int, float, list, set, dict, deque, Counter, defaultdict, queue.Queue)


def is_code(value: Any) -> bool:
    """Tell whether a value counts by its code: a function, a class, a module."""
    value = unwrapped(value)
    if isinstance(value, types.BuiltinFunctionType) and not isinstance(
        value.__self__, (types.ModuleType, type, type(None))
    ):
        return False
    kinds = (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)
    return isinstance(value, (*kinds, types.MethodDescriptorType, types.WrapperDescriptorType))


def unwrapped(value: Any) -> Any:
    """Return the function within what only caches or dispatches to it."""
    while isinstance(value, functools._lru_cache_wrapper):
        value = value.__wrapped__
    return value


def module_of(value: Any) -> str:
    """Return the name of the module that a function or class is defined in."""
    module = getattr(value, "__module__", None)
    if isinstance(module, str) and module:
        return module_name(module)
    owner = getattr(value, "__objclass__", getattr(value, "__self__", value))
    if isinstance(owner, types.ModuleType):
        return module_name(owner.__name__)
    return (owner if isinstance(owner, type) else type(owner)).__module__


def qualname_of(value: Any) -> str:
    """Return the qualified name of a thing, "?" where it has none."""
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", "?")


def dotted_name(value: Any, fallback: str) -> str:
    """Return the name a thing has where it is defined: `time.time`, however it was imported."""
    if isinstance(value, types.ModuleType):
        return module_name(value.__name__)
    if value is os.environ or value is os.environb:
        return "os.environ"
    if isinstance(value, type) or is_code(value):
        return f"{module_of(value)}.{qualname_of(value)}"
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        owner = value.__self__ if isinstance(value.__self__, type) else type(value.__self__)
        return f"{owner.__module__}.{owner.__qualname__}.{value.__name__}"
    return fallback


def library_name(value: Any) -> str | None:
    """Return the full name of an object that its library exports under that name, else None."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules:
        return None
    if origin_of(module).is_project or getattr(sys.modules[module], name, None) is not value:
        return None
    return f"{module}.{name}"


def field_parts(field: dataclasses.Field[Any]) -> tuple[object, ...]:
    """Return what a field of a dataclass is made of."""
    default = (field.default, field.default_factory, dict(field.metadata))
    return (field.name, field.init, field.compare, field.hash, field.kw_only, *default)


def annotation_text(kind: object) -> str:
    """Return an annotation as text."""
    return qualname_of(kind) if isinstance(kind, type) else repr(kind)


def resolve_name(module: str, scope: dict[str, Any]) -> str:
    """Return the full name of a module that is imported within `scope`."""
    if not module.startswith("."):
        return module
    return importlib.util.resolve_name(module, scope.get("__package__") or "")


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove the docstrings of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    node.body = node.body[1:]
    return tree


def imports_of(tree: ast.Module, module: types.ModuleType) -> set[str]:
    """Return the names of the modules that a module imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = resolve_name(base, vars(module))
            names.add(base)
            names |= {f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in sys.modules}
    return names
