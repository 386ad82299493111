"""Encodings of what is not a plain value: arrays, tensors, modules, functions, objects.

Types are matched by name, so that no library is imported for being looked for. Only exact
types are taken: a subclass may hold more than its base shows.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import logging
import pathlib
import re
import sys
import threading
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from typing import TYPE_CHECKING, Any

import numpy as np

from trainonce.graph import frame_encoders
from trainonce.graph.digest import Encoder, Handler, handles, resolves, unhashable
from trainonce.graph.packages import module_name

if TYPE_CHECKING:
    import torch

# Attributes of an nn.Module that say nothing about what it computes.
_MODULE_INCIDENTAL = frozenset({"_compiled_call_impl", "_is_full_backward_hook"})

# ---------------------------------------------------------------- small types of the library


def _by_repr(encoder: Encoder, value: object, path: str) -> None:
    encoder.record(type(value).__qualname__, repr(value), path=path)


for _cls in (
    datetime.date, datetime.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID, range,
    type(Ellipsis), type(NotImplemented),
):  # fmt: skip
    handles(_cls)(_by_repr)


@handles(datetime.datetime)
@handles(datetime.time)
def _moment(encoder: Encoder, value: datetime.datetime, path: str) -> None:
    zone = value.tzinfo
    if zone is not None and zone.utcoffset(None) is None:
        # A named zone is a table of rules that the instant alone does not show.
        encoder.record(type(value).__qualname__, value.isoformat(), str(zone), path=path)
    else:
        encoder.record(type(value).__qualname__, value.isoformat(), path=path)


@handles(slice)
def _slice(encoder: Encoder, value: slice, path: str) -> None:
    encoder.record("slice", value.start, value.stop, value.step, path=path)


for _cls in (pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath):

    @handles(_cls)
    def _path(encoder: Encoder, value: pathlib.PurePath, path: str) -> None:
        # Only the name: `once.File` is for content.
        encoder.record("path", str(value), path=path)


@handles(OrderedDict)
def _ordered_dict(encoder: Encoder, value: OrderedDict[object, object], path: str) -> None:
    encoder.record("OrderedDict", dict(value), path=path)


@handles(Counter)
def _counter(encoder: Encoder, value: Counter[object], path: str) -> None:
    encoder.record("Counter", dict(value), path=path)


@handles(defaultdict)
def _default_dict(encoder: Encoder, value: defaultdict[object, object], path: str) -> None:
    encoder.record("defaultdict", value.default_factory, dict(value), path=path)


@handles(deque)
def _deque(encoder: Encoder, value: deque[object], path: str) -> None:
    encoder.record("deque", value.maxlen, list(value), path=path)


@handles(types.MappingProxyType)
def _proxy(encoder: Encoder, value: types.MappingProxyType[object, object], path: str) -> None:
    encoder.record("mappingproxy", dict(value), path=path)


@handles(re.Pattern)
def _pattern(encoder: Encoder, value: re.Pattern[Any], path: str) -> None:
    encoder.record("pattern", value.pattern, value.flags, path=path)


@handles(types.GenericAlias)
def _alias(encoder: Encoder, value: types.GenericAlias, path: str) -> None:
    encoder.record("alias", value.__origin__, value.__args__, path=path)


@handles(type(int | str))
def _union(encoder: Encoder, value: types.UnionType, path: str) -> None:
    encoder.record("union", value.__args__, path=path)


@handles(logging.Logger)
def _logger(encoder: Encoder, value: logging.Logger, path: str) -> None:
    encoder.record("logger", value.name, path=path)


def _without_state(encoder: Encoder, value: object, path: str) -> None:
    encoder.record(type(value).__qualname__, path=path)


for _cls in (type(threading.Lock()), type(threading.RLock())):
    # A lock holds no data that a result could depend on.
    handles(_cls)(_without_state)


@handles(types.SimpleNamespace)
def _namespace(encoder: Encoder, value: types.SimpleNamespace, path: str) -> None:
    encoder.record("namespace", vars(value), path=path)


# ---------------------------------------------------------------- arrays and tensors


@handles(np.ndarray)
@handles(np.memmap)
def _array(encoder: Encoder, value: np.ndarray, path: str) -> None:
    if value.dtype.hasobject:
        encoder.record("objects", value.shape, list(value.reshape(-1)), path=path)
        return
    try:
        kind = value.dtype.descr if value.dtype.names else value.dtype.str
    except ValueError as error:
        raise unhashable(path, value, f"its fields overlap: {error}") from error
    encoder.head(b"r", 3)
    encoder.raw(b"s", b"ndarray")
    encoder.value(kind, path)
    encoder.value(tuple(value.shape), path)
    encoder.raw(b"b", array_bytes(value))


def array_bytes(array: np.ndarray) -> memoryview:
    """Return the elements of an array without objects, in C order, as bytes."""
    if array.size == 0 or array.itemsize == 0:
        return memoryview(b"")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@handles(np.ma.MaskedArray)
def _masked(encoder: Encoder, value: np.ma.MaskedArray, path: str) -> None:
    mask = np.ma.getmaskarray(value)
    encoder.record("masked", np.asarray(value.data), mask, value.fill_value, path=path)


def _numpy_scalar(encoder: Encoder, value: np.generic, path: str) -> None:
    encoder.record("scalar", value.dtype.str, np.asarray(value).tobytes(), path=path)


def _tensor(encoder: Encoder, value: torch.Tensor, path: str) -> None:
    import torch

    if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
        raise unhashable(path, value, f"its layout is {value.layout} on {value.device}")
    if vars(value):
        raise unhashable(path, value, f"it carries attributes {sorted(vars(value))}")
    if not value.is_leaf:
        raise unhashable(path, value, "it carries an autograd graph; detach it")
    encoder.head(b"r", 7)
    encoder.raw(b"s", b"tensor")
    encoder.value(type(value).__name__, path)
    encoder.value(str(value.dtype).removeprefix("torch."), path)
    encoder.value(tuple(value.shape), path)
    encoder.value(value.device.type, path)
    encoder.value(value.requires_grad, path)
    encoder.value(value.grad, f"{path}.grad")
    encoder.raw(b"b", tensor_bytes(value))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the elements of a strided tensor of any dtype and device, in C order, as bytes."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().cpu().reshape(-1)
    if flat.stride(0) != 1:  # one element is contiguous to torch whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def _module(encoder: Encoder, value: torch.nn.Module, path: str) -> None:
    """Class, parameters, buffers, sub-modules, hooks, mode and every other attribute."""
    import torch

    if isinstance(value, torch.jit.ScriptModule):
        raise unhashable(path, value, "a script module keeps its state outside Python")
    state: dict[str, object] = {}
    for name, item in sorted(vars(value).items()):
        if name.endswith("_hooks") or "_hooks_" in name:
            # Hooks are kept under process-wide counters, which say nothing.
            item = list(item.values()) if isinstance(item, dict) else item
        elif isinstance(item, OrderedDict):
            item = dict(item)
        if name not in _MODULE_INCIDENTAL:
            state[name] = item
    encoder.record("module", type(value), path=path)
    for name, item in state.items():
        encoder.value(name, path)
        if name in ("_parameters", "_buffers", "_modules"):
            encoder.head(b"d", len(item))  # type: ignore[arg-type]
            for key, child in item.items():  # type: ignore[union-attr]
                encoder.value(key, path)
                encoder.value(child, f"{path}.{key}")
        else:
            encoder.value(item, f"{path}.{name}")


# ---------------------------------------------------------------- functions, classes, objects


@handles(functools.partial)
def _partial(encoder: Encoder, value: functools.partial[object], path: str) -> None:
    encoder.record("partial", value.func, value.args, value.keywords, path=path)


def _code(encoder: Encoder, value: Any, path: str) -> None:
    from trainonce.graph import code

    encoder.record("code", code.encode_code(value, path), path=path)


def _library_object(encoder: Encoder, value: Any, path: str) -> None:
    """An object of compiled code that can be imported by its name: the name and the version."""
    from trainonce.graph import code, code_objects

    name = code_objects.library_name(value)
    if name is None:
        raise unhashable(path, value, "its state is not known to be complete")
    encoder.record("library", name, code.encode_code(sys.modules[value.__module__], path))


for _cls in (
    types.FunctionType, types.ModuleType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.ClassMethodDescriptorType, functools._lru_cache_wrapper,
):  # fmt: skip
    handles(_cls)(_code)


@handles(types.BuiltinFunctionType)
def _builtin(encoder: Encoder, value: types.BuiltinFunctionType, path: str) -> None:
    owner = value.__self__
    shared = type(owner).__module__ in ("random", "numpy.random.mtrand")
    if owner is None or shared or isinstance(owner, (type, types.ModuleType)):
        # Draws from a shared generator are seen when the function runs.
        _code(encoder, value, path)
    else:
        encoder.record("bound", value.__name__, owner, path=path)


@handles(types.MethodType)
def _method(encoder: Encoder, value: types.MethodType, path: str) -> None:
    encoder.record("method", value.__func__, value.__self__, path=path)


def _enum(encoder: Encoder, value: enum.Enum, path: str) -> None:
    encoder.record("enum", type(value), value.name, path=path)


def _object(encoder: Encoder, value: object, path: str) -> None:
    """An object of a pure Python class: its class and every attribute it holds."""
    state = _attributes(value)
    encoder.record("object", type(value), path=path)
    encoder.head(b"d", len(state))
    for name, item in state.items():
        encoder.value(name, path)
        encoder.value(item, f"{path}.{name}")


def _attributes(value: object) -> dict[str, object]:
    state = dict(sorted(getattr(value, "__dict__", {}).items()))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                stored = f"_{cls.__name__.lstrip('_')}{name}" if private else name
                if hasattr(value, stored):
                    state[stored] = getattr(value, stored)
    if dataclasses.is_dataclass(value):
        # A cached property is derived from the fields, and may or may not be there yet.
        derived = {
            name
            for cls in type(value).__mro__
            for name, item in vars(cls).items()
            if isinstance(item, functools.cached_property)
        }
        state = {name: item for name, item in state.items() if name not in derived}
    return state


def _named_tuple(encoder: Encoder, value: tuple[object, ...], path: str) -> None:
    encoder.record("namedtuple", type(value), tuple(value), path=path)


# ---------------------------------------------------------------- by name, by base, by kind

_BY_NAME: dict[str, Handler] = {
    "torch.Tensor": _tensor,
    "torch.nn.parameter.Parameter": _tensor,
    "torch.nn.parameter.Buffer": _tensor,
    "torch.dtype": _by_repr,
    "torch.device": _by_repr,
    "torch.memory_format": _by_repr,
    "torch.layout": _by_repr,
    "typing.TypeVar": _by_repr,
    "typing.ParamSpec": _by_repr,
    "torch.Size": lambda e, v, p: e.record("Size", tuple(v), path=p),
    **frame_encoders.BY_NAME,
}
# Base class -> handler, for families whose every member shares one complete state.
_BY_BASE: dict[str, Handler] = {
    **frame_encoders.BY_BASE,
    "torch.nn.modules.module.Module": _module,
}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@resolves
def _resolve(cls: type) -> Handler | None:
    """Find the handler of a type by its name, its bases or its kind."""
    if issubclass(cls, type):
        return _code
    if _name(cls) in _BY_NAME:
        return _BY_NAME[_name(cls)]
    if issubclass(cls, np.generic) and cls.__module__ == "numpy":
        return _numpy_scalar
    if issubclass(cls, np.dtype):
        return _by_repr
    if issubclass(cls, enum.Enum):
        return _enum
    for base in cls.__mro__:
        if _name(base) in _BY_BASE:
            return _BY_BASE[_name(base)]
    if issubclass(cls, tuple) and hasattr(cls, "_fields") and cls.__mro__[1] is tuple:
        return _named_tuple
    return _object if _is_pure_python(cls) else _library_object


def _is_pure_python(cls: type) -> bool:
    """Tell whether objects of `cls` keep their whole state in `__dict__` and `__slots__`."""
    bases = [base for base in cls.__mro__ if base is not object]
    # CPython marks classes made by a `class` statement as heap types that Python code defined.
    return all(
        base.__flags__ & (1 << 9) and ("__module__" in vars(base)) and _has_python_source(base)
        for base in bases
        if base.__module__ not in ("typing", "abc")
    )


def _has_python_source(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return module_name(cls.__module__) == "__main__" or (
        file is not None and str(file).endswith(".py")
    )
