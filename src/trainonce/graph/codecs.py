"""How results become bytes: a JSON tree that describes them, and the raw buffers it names.

Nothing is pickled and nothing is executed: a class is only ever looked up among those that this
process has already imported. Equal values have equal bytes.

Layout: the magic, the length of the tree (u64, little endian), the tree as JSON, then the
buffers, each padded to 64 bytes.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
import struct
import sys
from collections import OrderedDict
from typing import Any

import numpy as np

from trainonce.errors import EncodingError
from trainonce.graph.digest import digest
from trainonce.graph.encoders import array_bytes, tensor_bytes
from trainonce.graph.forms import FORMS, class_name, register_codec

__all__ = ["decode", "encode", "register_codec"]

MAGIC = b"TRAINONCE-BLOB-1"
_ALIGN = 64
_HEAD = struct.Struct("<Q")


def encode(value: object) -> bytes:
    """Return `value` as bytes.

    Raises:
        EncodingError: A part has no safe encoding; the message says where it sits.
    """
    writer = _Writer()
    tree = json.dumps(writer.node(value, "result"), separators=(",", ":")).encode()
    pieces = [MAGIC, _HEAD.pack(len(tree)), tree]
    offset = sum(map(len, pieces))
    for buffer in writer.buffers:
        padding = -offset % _ALIGN
        pieces += [b"\0" * padding, buffer]
        offset += padding + len(buffer)
    data = b"".join(pieces)
    if writer.is_delicate and digest(decode(bytearray(data))) != digest(value):
        raise EncodingError("the result does not come back equal from its encoding")
    return data


def decode(data: bytearray) -> Any:
    """Return the value in `data`, which it may alias: hand over a buffer of your own.

    Raises:
        EncodingError: These are not the bytes of a value, or of a class that is not imported.
    """
    if not data.startswith(MAGIC):
        raise EncodingError("these bytes are not a stored result")
    start = len(MAGIC) + _HEAD.size
    (length,) = _HEAD.unpack_from(data, len(MAGIC))
    try:
        tree = json.loads(bytes(data[start : start + length]))
    except ValueError as error:
        raise EncodingError(f"a stored result cannot be read: {error}") from error
    try:
        return _Reader(data, start + length).node(tree)
    except EncodingError:
        raise
    except Exception as error:  # a library that is missing here, or is another version
        raise EncodingError(f"a stored result cannot be read: {error!r}") from error


class _Writer:
    """Turns values into a JSON tree; what is large goes into `buffers`."""

    def __init__(self) -> None:
        self.buffers: list[memoryview | bytes] = []
        self.is_delicate = False

    def buffer(self, data: memoryview | bytes) -> int:
        """Keep a buffer and return its length, by which the reader finds it again."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else b""
        self.buffers.append(view)
        return len(view)

    def node(self, value: Any, path: str) -> Any:
        """Return the tree of one value."""
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            # JSON readers limit the digits of a number.
            return value if abs(value) < 1 << 63 else ["int", hex(value)]
        if kind in (list, tuple):
            items = [self.node(item, f"{path}[{n}]") for n, item in enumerate(value)]
            return [kind.__name__, *items]
        if kind in (set, frozenset):
            return [kind.__name__, *(self.node(i, path) for i in sorted(value, key=digest))]
        if kind in (dict, OrderedDict):
            pairs = [
                [self.node(key, path), self.node(item, f"{path}[{key!r}]")]
                for key, item in value.items()
            ]
            return [kind.__name__, *pairs]
        if kind in (bytes, bytearray):
            return [kind.__name__, self.buffer(value)]
        if kind is complex:
            return ["complex", value.real, value.imag]
        return self._rich(value, path)

    def _rich(self, value: Any, path: str) -> Any:
        kind = type(value)
        name = class_name(kind)
        if name in FORMS:
            self.is_delicate = True
            return ["taught", name, self.node(_plain_form(name, value, path), path)]
        if isinstance(value, pathlib.PurePath):
            return ["path", str(value)]
        if kind in (datetime.date, datetime.datetime, datetime.time):
            self.is_delicate = True
            return [kind.__name__, value.isoformat()]
        if kind is datetime.timedelta:
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if kind is decimal.Decimal:
            return ["Decimal", str(value)]
        if kind in (np.ndarray, np.memmap) and not value.dtype.hasobject:
            self.is_delicate |= value.dtype.names is not None  # gaps have no names
            dtype = value.dtype.descr if value.dtype.names else value.dtype.str
            return ["array", dtype, list(value.shape), self.buffer(array_bytes(value))]
        if kind is np.ndarray:
            self.is_delicate = True
            items = [self.node(item, path) for item in value.reshape(-1)]
            return ["objects", list(value.shape), items]
        if isinstance(value, np.generic) and not value.dtype.hasobject and not value.dtype.names:
            return ["scalar", value.dtype.str, self.buffer(value.tobytes())]
        if name in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            return self._tensor(value, path)
        if name == "pyarrow.lib.Table":
            return self._arrow(value)
        if name in ("pandas.DataFrame", "pandas.core.frame.DataFrame"):
            return self._pandas(value, path)
        return self._object(value, path)

    def _tensor(self, value: Any, path: str) -> Any:
        import torch

        if value.layout is not torch.strided or value.is_quantized or not value.is_leaf:
            raise _no_codec(path, value, "only detached dense tensors are stored; detach it")
        if value.grad is not None:
            raise _no_codec(path, value, "it carries a gradient")
        dtype = str(value.dtype).removeprefix("torch.")
        is_parameter = isinstance(value, torch.nn.Parameter)
        flags = [value.device.type, bool(value.requires_grad), is_parameter]
        return ["tensor", dtype, list(value.shape), flags, self.buffer(tensor_bytes(value))]

    def _arrow(self, value: Any) -> Any:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as stream:
            stream.write_table(value.combine_chunks())
        self.is_delicate = True
        return ["arrow", self.buffer(memoryview(sink.getvalue()))]

    def _pandas(self, value: Any, path: str) -> Any:
        try:
            import pyarrow as pa

            table = pa.Table.from_pandas(value)
        except (ImportError, ValueError, TypeError) as error:
            raise _no_codec(path, value, f"Arrow does not take it: {error}") from error
        return ["pandas", self._arrow(table)]

    def _object(self, value: Any, path: str) -> Any:
        kind = type(value)
        if isinstance(value, enum.Flag):
            return ["flag", class_name(kind), value.value]
        if isinstance(value, enum.Enum):
            return ["enum", class_name(kind), value.name]
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            self.is_delicate = True
            return ["namedtuple", class_name(kind), [self.node(item, path) for item in value]]
        if dataclasses.is_dataclass(value):
            self.is_delicate = True
            names = [field.name for field in dataclasses.fields(value)]
            fields = [[n, self.node(getattr(value, n), f"{path}.{n}")] for n in names]
            return ["dataclass", class_name(kind), fields]
        raise _no_codec(path, value, "no safe encoding is known for its type")


class _Reader:
    """Turns a JSON tree back into values; buffers come in the order they were written."""

    def __init__(self, data: bytearray, offset: int) -> None:
        self._data = memoryview(data)
        self._offset = offset

    def buffer(self, length: int) -> memoryview:
        """Return the next buffer, writable, and not a copy."""
        self._offset += -self._offset % _ALIGN
        view = self._data[self._offset : self._offset + length]
        if len(view) != length:
            raise EncodingError("a stored result is too short")
        self._offset += length
        return view

    def node(self, tree: Any) -> Any:
        """Return the value of one node of the tree."""
        if not isinstance(tree, list):
            return tree
        read = getattr(self, f"_read_{tree[0]}", None)
        if read is None:
            raise EncodingError(f"a stored result has parts of an unknown kind {tree[0]!r}")
        return read(*tree[1:])

    def _read_int(self, text: str) -> Any:
        return int(text, 16)

    def _read_list(self, *items: Any) -> Any:
        return [self.node(item) for item in items]

    def _read_tuple(self, *items: Any) -> Any:
        return tuple(self.node(item) for item in items)

    def _read_set(self, *items: Any) -> Any:
        return {self.node(item) for item in items}

    def _read_frozenset(self, *items: Any) -> Any:
        return frozenset(self.node(item) for item in items)

    def _read_dict(self, *pairs: Any) -> Any:
        return {self.node(key): self.node(item) for key, item in pairs}

    def _read_OrderedDict(self, *pairs: Any) -> Any:
        return OrderedDict(self._read_dict(*pairs))

    def _read_bytes(self, length: int) -> Any:
        return bytes(self.buffer(length))

    def _read_bytearray(self, length: int) -> Any:
        return bytearray(self.buffer(length))

    def _read_complex(self, real: float, imag: float) -> Any:
        return complex(real, imag)

    def _read_array(self, dtype: Any, shape: list[int], length: int) -> Any:
        kind = np.dtype([_field(f) for f in dtype] if isinstance(dtype, list) else dtype)
        if kind.hasobject:
            raise EncodingError("a stored array of objects is refused")
        if kind.itemsize == 0 or length == 0:
            return np.zeros(shape, kind)
        return np.frombuffer(self.buffer(length), np.uint8).view(kind).reshape(shape)

    def _read_objects(self, shape: list[int], items: list[Any]) -> Any:
        array = np.empty(len(items), object)
        for place, item in enumerate(items):
            array[place] = self.node(item)
        return array.reshape(shape)

    def _read_scalar(self, dtype: str, length: int) -> Any:
        return np.frombuffer(self.buffer(length), np.uint8).view(dtype)[0]

    def _read_tensor(self, dtype: str, shape: list[int], flags: list[Any], length: int) -> Any:
        import torch

        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise EncodingError(f"unknown tensor dtype {dtype!r}")
        data = self.buffer(length)
        if length:
            tensor = torch.frombuffer(data, dtype=torch.uint8).view(kind).reshape(shape)
        else:
            tensor = torch.empty(shape, dtype=kind)
        device, requires_grad, is_parameter = flags
        if device == "cuda" and torch.cuda.is_available():
            tensor = tensor.cuda()
        if is_parameter:
            return torch.nn.Parameter(tensor, requires_grad=requires_grad)
        return tensor.requires_grad_(requires_grad) if requires_grad else tensor

    def _read_arrow(self, length: int) -> Any:
        import pyarrow as pa

        return pa.ipc.open_stream(bytes(self.buffer(length))).read_all()

    def _read_pandas(self, table: Any) -> Any:
        return self.node(table).to_pandas()

    def _read_path(self, text: str) -> Any:
        return pathlib.Path(text)

    def _read_date(self, text: str) -> Any:
        return datetime.date.fromisoformat(text)

    def _read_datetime(self, text: str) -> Any:
        return datetime.datetime.fromisoformat(text)

    def _read_time(self, text: str) -> Any:
        return datetime.time.fromisoformat(text)

    def _read_timedelta(self, days: int, seconds: int, microseconds: int) -> Any:
        return datetime.timedelta(days, seconds, microseconds)

    def _read_Decimal(self, text: str) -> Any:
        return decimal.Decimal(text)

    def _read_enum(self, name: str, member: str) -> Any:
        return _imported(name, enum.Enum)[member]

    def _read_flag(self, name: str, value: int) -> Any:
        return _imported(name, enum.Flag)(value)

    def _read_namedtuple(self, name: str, items: list[Any]) -> Any:
        return _imported(name, tuple)._make(self.node(item) for item in items)

    def _read_dataclass(self, name: str, fields: list[Any]) -> Any:
        cls = _imported(name, object)
        known = {field.name for field in dataclasses.fields(cls)}
        value = object.__new__(cls)
        for key, item in fields:
            if key not in known:
                raise EncodingError(f"{name} has no field {key!r}")
            object.__setattr__(value, key, self.node(item))
        return value

    def _read_taught(self, name: str, plain: Any) -> Any:
        if name not in FORMS:
            raise EncodingError(f"no codec is registered for {name}")
        return FORMS[name][1](self.node(plain))


def _plain_form(name: str, value: Any, path: str) -> Any:
    try:
        return FORMS[name][0](value)
    except Exception as error:
        raise _no_codec(path, value, f"it does not become plain values: {error!r}") from error


def _field(field: list[Any]) -> tuple[Any, ...]:
    name, kind, *shape = field
    kind = [_field(inner) for inner in kind] if isinstance(kind, list) else kind
    return (name, kind, *(tuple(size) for size in shape))


def _imported(name: str, base: type) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for step in path.split("."):
        found = getattr(found, step, None)
    if not isinstance(found, type) or not issubclass(found, base) or class_name(found) != name:
        raise EncodingError(f"the class {name} of a stored result is not imported here")
    if base is object and not dataclasses.is_dataclass(found):
        raise EncodingError(f"{name} is no dataclass")
    return found


def _no_codec(path: str, value: object, reason: str) -> EncodingError:
    cls = type(value)
    return EncodingError(
        f"{path} of type {cls.__module__}.{cls.__qualname__} cannot be stored: {reason}",
        hint="return arrays, tensors, frames, dataclasses or plain values (for a module its "
        "`state_dict()`), or teach the type with `trainonce.graph.codecs.register_codec`",
    )
