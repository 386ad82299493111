"""State as a JSON-able tree beside its tensors.

None, bool, str, finite floats and integers of up to 64 bits stand for themselves, a list is an
array, and a dict whose keys are all strings is an object. Everything else is an object with the
key "$" that names its type, so a dict that holds the key "$" is written in that form too.

Reading builds values of a closed list of types, and can run no code.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.errors import EncodingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_TAG = "$"
_INT64 = 1 << 63
_HINT = "keep plain values, tensors and containers of them, or give the object a state_dict"
dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class _Refused(Exception):
    """A value without an encoding; collects its path from the inside out."""

    def __init__(self, what: str, hint: str = _HINT) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.path: list[str] = []

    def named(self) -> EncodingError:
        path = "".join(reversed(self.path)).removeprefix(".") or "the value"
        return EncodingError(f"{path}: {self.what}", hint=self.hint)


def flatten(value: Any) -> tuple[Any, list[torch.Tensor]]:
    """Split `value` into a JSON-able tree and the tensors in it.

    Supported are None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset,
    dict, OrderedDict (with a module's version metadata), defaultdict of a builtin type,
    Counter, NumPy scalars and arrays, dense tensors, `torch.dtype`, `torch.device` and
    `torch.Size`, each of exactly that type. Any of them that is hashable by value can be a
    key. Order of keys is kept; sets are sorted, so that equal sets give equal trees.

    Args:
        value: The tree. It may not contain itself.

    Returns:
        The tree, and the tensors in order of appearance: detached, but not copied, so they
        alias the originals. An array appears as a uint8 copy of its bytes.

    Raises:
        EncodingError: A part has no encoding; the message names its path.
    """
    tensors: list[torch.Tensor] = []
    try:
        return _flatten(value, tensors), tensors
    except _Refused as refused:
        raise refused.named() from None
    except RecursionError:
        raise EncodingError(
            "the value is nested too deeply, or contains itself", hint="break the cycle"
        ) from None


def unflatten(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """Put a value together again from what `flatten` returned.

    Args:
        tree: The tree.
        tensors: As many as `flatten` returned, in its order. They become part of the value,
            uncopied.

    Raises:
        EncodingError: The tree is not one of `flatten`'s, or a tensor is missing.
    """
    try:
        return _unflatten(tree, tensors)
    except EncodingError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise EncodingError(f"not an encoded tree: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------ writing


def _flatten(value: Any, tensors: list[torch.Tensor]) -> Any:
    return _WRITERS[type(value)](value, tensors)


def _itself(value: Any, _tensors: list[torch.Tensor]) -> Any:
    return value


def _write_int(value: int, _tensors: list[torch.Tensor]) -> Any:
    if -_INT64 <= value < _INT64:
        return value
    return {_TAG: "int", "v": hex(value)}  # decimal digits have a limit, and take longer


def _write_float(value: float, _tensors: list[torch.Tensor]) -> Any:
    if math.isfinite(value):
        return value
    return {_TAG: "float", "v": struct.pack(">d", value).hex()}


def _write_complex(value: complex, _tensors: list[torch.Tensor]) -> Any:
    return {_TAG: "complex", "v": struct.pack(">dd", value.real, value.imag).hex()}


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write_str(value: str, _tensors: list[torch.Tensor]) -> Any:
    if value.isascii() or _is_unicode(value):
        return value
    # JSON would join two lone surrogates into one character.
    return {_TAG: "str", "v": value.encode("utf-32-le", "surrogatepass").hex()}


def _write_bytes(value: bytes, _tensors: list[torch.Tensor]) -> Any:
    return {_TAG: "bytes", "v": base64.b64encode(value).decode()}


def _write_items(value: Iterable[Any], tensors: list[torch.Tensor]) -> list[Any]:
    items: list[Any] = []
    try:
        for item in value:
            items.append(_WRITERS[type(item)](item, tensors))  # noqa: PERF401 (len is the path)
    except _Refused as refused:
        refused.path.append(f"[{len(items)}]")
        raise
    return items


def _write_tuple(value: tuple[Any, ...], tensors: list[torch.Tensor]) -> Any:
    return {_TAG: "tuple", "v": _write_items(value, tensors)}


def _write_size(value: torch.Size, tensors: list[torch.Tensor]) -> Any:
    return {_TAG: "Size", "v": _write_items(value, tensors)}


def _write_set(value: set[Any] | frozenset[Any], _tensors: list[torch.Tensor]) -> Any:
    items = sorted((_write_key(item) for item in value), key=dumps)
    return {_TAG: type(value).__name__, "v": items}


def _write_key(key: Any) -> Any:
    found: list[torch.Tensor] = []
    tree = _flatten(key, found)
    if found:
        raise _Refused("a tensor as a key, which is found again by identity only")
    return tree


def _step(key: Any) -> str:
    return f".{key}" if type(key) is str and key.isidentifier() else f"[{key!r}]"


def _write_pairs(value: dict[Any, Any], tensors: list[torch.Tensor]) -> list[Any]:
    pairs: list[Any] = []
    for key, item in value.items():
        try:
            pairs.append([_write_key(key), _flatten(item, tensors)])
        except _Refused as refused:
            refused.path.append(_step(key))
            raise
    return pairs


def _write_dict(value: dict[Any, Any], tensors: list[torch.Tensor]) -> Any:
    tree: dict[str, Any] = {}
    for key in value:
        if type(key) is not str or key == _TAG or not (key.isascii() or _is_unicode(key)):
            return _write_tagged_dict(value, tensors)
    for key, item in value.items():
        try:
            tree[key] = _WRITERS[type(item)](item, tensors)
        except _Refused as refused:
            refused.path.append(_step(key))
            raise
    return tree


def _write_tagged_dict(value: dict[Any, Any], tensors: list[torch.Tensor]) -> Any:
    return {_TAG: type(value).__name__, "v": _write_pairs(value, tensors)}


def _write_ordered_dict(value: OrderedDict[Any, Any], tensors: list[torch.Tensor]) -> Any:
    tree = _write_tagged_dict(value, tensors)
    metadata = getattr(value, "_metadata", None)  # nn.Module.state_dict keeps versions there
    if metadata is not None:
        tree["m"] = _flatten(metadata, tensors)
    return tree


def _write_defaultdict(value: defaultdict[Any, Any], tensors: list[torch.Tensor]) -> Any:
    factory = value.default_factory
    name = None if factory is None else getattr(factory, "__name__", "")
    if name is not None and _FACTORIES.get(name) is not factory:
        raise _Refused(
            f"a defaultdict of {_describe(factory)}", "its factory must be one of the builtin types"
        )
    return {_TAG: "defaultdict", "f": name, "v": _write_pairs(value, tensors)}


def _write_tensor(value: torch.Tensor, tensors: list[torch.Tensor]) -> Any:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise _Refused(
            f"a tensor without plain bytes ({value.layout}, {value.dtype}, {value.device})",
            "keep it as dense tensors",
        )
    tensors.append(value.detach())
    return {_TAG: "tensor", "v": len(tensors) - 1}


def _write_array(value: np.ndarray, tensors: list[torch.Tensor]) -> Any:
    raw = bytearray(value.tobytes())
    tensors.append(torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte())
    return {
        _TAG: "ndarray",
        "dtype": _array_dtype(value.dtype),
        "shape": list(value.shape),
        "v": len(tensors) - 1,
    }


def _write_numpy_scalar(value: np.generic, _tensors: list[torch.Tensor]) -> Any:
    return {_TAG: "npscalar", "dtype": _array_dtype(value.dtype), "v": value.tobytes().hex()}


def _array_dtype(dtype: np.dtype) -> str:
    if dtype.kind not in "biufcSUMm":
        raise _Refused(f"NumPy data of dtype {dtype}", "keep numbers, strings or times")
    return dtype.str


def _write_dtype(value: torch.dtype, _tensors: list[torch.Tensor]) -> Any:
    return {_TAG: "dtype", "v": str(value).removeprefix("torch.")}


def _write_device(value: torch.device, _tensors: list[torch.Tensor]) -> Any:
    return {_TAG: "device", "v": str(value)}


class _Writers(dict[type, "Callable[[Any, list[torch.Tensor]], Any]"]):
    """Type to writer; a type that is not listed gets the writer that refuses it."""

    def __missing__(self, _kind: type) -> Callable[[Any, list[torch.Tensor]], Any]:
        return _refuse


_WRITERS = _Writers(
    {
        type(None): _itself,
        bool: _itself,
        int: _write_int,
        float: _write_float,
        complex: _write_complex,
        str: _write_str,
        bytes: _write_bytes,
        list: _write_items,
        tuple: _write_tuple,
        set: _write_set,
        frozenset: _write_set,
        dict: _write_dict,
        OrderedDict: _write_ordered_dict,
        defaultdict: _write_defaultdict,
        Counter: _write_tagged_dict,
        torch.Tensor: _write_tensor,
        torch.nn.Parameter: _write_tensor,
        torch.Size: _write_size,
        torch.dtype: _write_dtype,
        torch.device: _write_device,
        np.ndarray: _write_array,
    }
)
_WRITERS.update(
    {
        scalar: _write_numpy_scalar
        for scalar in set(np.sctypeDict.values())
        if np.dtype(scalar).kind in "biufcSUMm"
    }
)
# What a defaultdict may fill with.
_FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, int, float, str, bytes, list, tuple, set, dict)
}


def _describe(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value) and hasattr(value, "__code__"):
        return "a function" if value.__name__ != "<lambda>" else "a lambda"
    return f"a value of type {type(value).__module__}.{type(value).__qualname__}"


def _refuse(value: Any, _tensors: list[torch.Tensor]) -> Any:
    hint = _HINT
    if isinstance(value, torch.Tensor):
        hint = "keep it as plain tensors"
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        raise _Refused(f"the named tuple {type(value).__name__}", "keep its _asdict()")
    elif callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        hint = "keep its state_dict()"
    raise _Refused(_describe(value), hint)


# ------------------------------------------------------------------------------ reading


def _unflatten(tree: Any, tensors: list[torch.Tensor]) -> Any:
    kind = type(tree)
    if kind is dict:
        tag = tree.get(_TAG)
        if tag is None:
            return {key: _unflatten(item, tensors) for key, item in tree.items()}
        return _READERS[tag](tree, tensors)
    if kind is list:
        return [_unflatten(item, tensors) for item in tree]
    return tree


def _read_items(tree: Any, tensors: list[torch.Tensor]) -> list[Any]:
    return [_unflatten(item, tensors) for item in tree["v"]]


def _read_pairs(tree: Any, tensors: list[torch.Tensor]) -> dict[Any, Any]:
    return {_unflatten(key, tensors): _unflatten(item, tensors) for key, item in tree["v"]}


def _read_ordered_dict(tree: Any, tensors: list[torch.Tensor]) -> OrderedDict[Any, Any]:
    value = OrderedDict(_read_pairs(tree, tensors))
    if "m" in tree:
        value._metadata = _unflatten(tree["m"], tensors)  # pyright: ignore[reportAttributeAccessIssue]
    return value


def _read_defaultdict(tree: Any, tensors: list[torch.Tensor]) -> defaultdict[Any, Any]:
    factory = None if tree["f"] is None else _FACTORIES[tree["f"]]
    return defaultdict(factory, _read_pairs(tree, tensors))


def _read_dtype(tree: Any, _tensors: list[torch.Tensor]) -> torch.dtype:
    return torch_dtype(tree["v"])


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of torch that is called `name`, and no other attribute of torch."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise EncodingError(f"{name!r} is no dtype")
    return dtype


def _plain_numpy_dtype(text: str) -> np.dtype:
    dtype = np.dtype(text)
    if dtype.kind not in "biufcSUMm":
        raise EncodingError(f"{text!r} is no dtype of numbers, strings or times")
    return dtype


def _read_array(tree: Any, tensors: list[torch.Tensor]) -> np.ndarray:
    raw = tensors[tree["v"]].cpu().numpy().tobytes()
    flat = np.frombuffer(bytearray(raw), dtype=_plain_numpy_dtype(tree["dtype"]))
    return flat.reshape(tree["shape"])


def _read_numpy_scalar(tree: Any, _tensors: list[torch.Tensor]) -> Any:
    return np.frombuffer(bytes.fromhex(tree["v"]), dtype=_plain_numpy_dtype(tree["dtype"]))[0]


def _read_counter(tree: Any, tensors: list[torch.Tensor]) -> Counter[Any]:
    return Counter(_read_pairs(tree, tensors))


_READERS: dict[str, Callable[[Any, list[torch.Tensor]], Any]] = {
    "int": lambda tree, _: int(tree["v"], 16),
    "float": lambda tree, _: struct.unpack(">d", bytes.fromhex(tree["v"]))[0],
    "complex": lambda tree, _: complex(*struct.unpack(">dd", bytes.fromhex(tree["v"]))),
    "str": lambda tree, _: bytes.fromhex(tree["v"]).decode("utf-32-le", "surrogatepass"),
    "bytes": lambda tree, _: base64.b64decode(tree["v"], validate=True),
    "tuple": lambda tree, tensors: tuple(_read_items(tree, tensors)),
    "set": lambda tree, tensors: set(_read_items(tree, tensors)),
    "frozenset": lambda tree, tensors: frozenset(_read_items(tree, tensors)),
    "dict": _read_pairs,
    "OrderedDict": _read_ordered_dict,
    "defaultdict": _read_defaultdict,
    "Counter": _read_counter,
    "tensor": lambda tree, tensors: tensors[tree["v"]],
    "Size": lambda tree, tensors: torch.Size(_read_items(tree, tensors)),
    "dtype": _read_dtype,
    "device": lambda tree, _: torch.device(tree["v"]),
    "ndarray": _read_array,
    "npscalar": _read_numpy_scalar,
}
