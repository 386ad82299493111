"""Digests: the names by which the graph knows values, files and blobs.

Two digests exist. The *value digest* names a Python value by a tagged canonical encoding, so
that equal values have equal digests in every process and on every host; the *blob digest* is
the plain BLAKE3 of bytes, as `b3sum` prints it. `checksum` (XXH3) is for verification only: it
finds damage and names nothing.

The encoding is specified in docs/graph-format.md and pinned by golden values. Each item is a tag
byte, a length or count (u64, little endian) and a payload; whatever is not a plain value is a
record with a name. A value that has no complete encoding raises `UnhashableError`: a part is
never dropped.
"""

from __future__ import annotations

import importlib
import struct
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash
from blake3 import blake3

from trainonce.errors import TrainOnceError, UnhashableError
from trainonce.graph.packages import module_name

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

FORMAT = b"trainonce-value-1\n"

# Encodes one value through the encoder it is given; the string is the path for errors.
Handler: TypeAlias = "Callable[[Encoder, Any, str], None]"

_TICK_NS = 2_000_000_000
_NAN = struct.pack("<Q", 0x7FF8000000000000)
_handlers: dict[type, Handler] = {}
_resolvers: list[Callable[[type], Handler | None]] = []


class Encoder:
    """Writes the canonical encoding of values into `write`.

    Args:
        write: Takes each piece of the encoding, in order; a `hasher.update` usually.
    """

    def __init__(self, write: Callable[[Any], object]) -> None:
        self._write = write
        self._open: set[int] = set()

    def raw(self, tag: bytes, payload: bytes | memoryview) -> None:
        """Write a tag, the payload's length in bytes, and the payload."""
        view = memoryview(payload)
        self._write(tag + struct.pack("<Q", view.nbytes))
        self._write(view)

    def head(self, tag: bytes, count: int) -> None:
        """Write a tag and a count; the caller writes that many items next."""
        self._write(tag + struct.pack("<Q", count))

    def record(self, name: str, *fields: object, path: str = "") -> None:
        """Write a record: its name, then its fields in order."""
        self.head(b"r", len(fields))
        self.raw(b"s", name.encode())
        for number, field in enumerate(fields):
            self.value(field, f"{path}.<{name} {number}>")

    def value(self, value: object, path: str = "value") -> None:
        """Write any value that has an encoding.

        Raises:
            UnhashableError: `value`, or something within it, has none.
        """
        handler = _handler_of(type(value), path)
        if handler in _ATOMS:
            handler(self, value, path)
            return
        if id(value) in self._open:
            raise unhashable(path, value, "it contains itself")
        self._open.add(id(value))
        try:
            handler(self, value, path)
        except (TrainOnceError, OSError):
            raise
        except Exception as error:  # a library's object that is not what it was known as
            raise unhashable(path, value, f"it cannot be read ({error!r})") from error
        finally:
            self._open.discard(id(value))


def digest(value: object, *, path: str = "value") -> str:
    """Return the value digest of `value`: 64 hex digits, equal in every process.

    Dictionaries are encoded in their order, since a function can observe it; sets are not.
    Arrays and tensors count by dtype, shape and elements, whatever their strides.

    Args:
        value: Plain values and containers, arrays, tensors, modules, frames, functions,
            dataclasses, objects of pure Python classes, or types known to `register`.
        path: How an error names the value.

    Raises:
        UnhashableError: A part has no complete encoding; `error.path` says which.
    """
    hasher = blake3(FORMAT)
    Encoder(hasher.update).value(value, path)
    return hasher.hexdigest()


def combine(name: str, parts: Iterable[tuple[str, str]]) -> str:
    """Return the digest of named digests: what action keys and row keys are made of."""
    hasher = blake3(FORMAT)
    Encoder(hasher.update).record(name, *(f"{key}={value}" for key, value in parts))
    return hasher.hexdigest()


def digest_bytes(data: bytes | memoryview, *, key: bytes | None = None) -> str:
    """Return the blob digest of `data`; under a 32-byte `key`, one that only its holder knows."""
    hasher = blake3(data, key=key) if key else blake3(data)
    return hasher.hexdigest()


def digest_file(path: str | os.PathLike[str], *, key: bytes | None = None) -> str:
    """Return the blob digest of a file's content."""
    hasher = blake3(key=key) if key else blake3()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def is_settled(stat: os.stat_result) -> bool:
    """Tell whether a file's next change would show in its stamps.

    One that changed just now may change again within the same tick of the file system's clock.
    """
    return time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) >= _TICK_NS


def checksum(data: bytes | memoryview) -> str:
    """Return the XXH3-128 of `data`: finds damage fast, names nothing."""
    return xxhash.xxh3_128_hexdigest(data)


def register(cls: type, fields: Callable[[Any], object]) -> None:
    """Teach the digest a type of yours.

    Args:
        cls: The exact type; subclasses may hold more, so they are registered on their own.
        fields: Returns plain values that together determine the object.
    """
    name = f"{module_name(cls.__module__)}.{cls.__qualname__}"

    def encode(encoder: Encoder, value: Any, path: str) -> None:
        encoder.record("registered", name, fields(value), path=path)

    _handlers[cls] = encode


def handles(cls: type) -> Callable[[Handler], Handler]:
    """Register the decorated handler for exactly `cls`."""

    def keep(handler: Handler) -> Handler:
        _handlers[cls] = handler
        return handler

    return keep


def resolves(resolver: Callable[[type], Handler | None]) -> Callable[[type], Handler | None]:
    """Register a function that finds a handler for types not known by name.

    It is asked once for each new type, so that optional libraries need not be imported.
    """
    _resolvers.append(resolver)
    return resolver


def unhashable(path: str, value: object, reason: str) -> UnhashableError:
    """Return the error for a value without a digest."""
    return _no_digest(path, type(value), reason)


def _no_digest(path: str, cls: type, reason: str) -> UnhashableError:
    error = UnhashableError(
        f"{path} of type {cls.__module__}.{cls.__qualname__} has no digest: {reason}",
        hint="pass plain data, or teach the type with `trainonce.graph.digest.register(cls, "
        "fields)`",
    )
    error.path = path
    return error


def _handler_of(cls: type, path: str) -> Handler:
    handler = _handlers.get(cls)
    if handler is not None:
        return handler
    importlib.import_module("trainonce.graph.encoders")  # fills both tables, once
    if cls in _handlers:
        return _handlers[cls]
    for resolver in _resolvers:
        handler = resolver(cls)
        if handler is not None:
            _handlers[cls] = handler
            return handler
    raise _no_digest(path, cls, "its state is not known to be complete")


# ---------------------------------------------------------------- plain values


@handles(type(None))
def _none(encoder: Encoder, value: None, path: str) -> None:
    encoder.head(b"N", 0)


@handles(bool)
def _bool(encoder: Encoder, value: bool, path: str) -> None:
    encoder.head(b"T" if value else b"F", 0)


@handles(int)
def _int(encoder: Encoder, value: int, path: str) -> None:
    num_bytes = (value.bit_length() + 8) // 8
    encoder.raw(b"i", value.to_bytes(num_bytes, "little", signed=True))


@handles(float)
def _float(encoder: Encoder, value: float, path: str) -> None:
    # One NaN for all: their payloads differ between machines, and nothing compares them.
    encoder.raw(b"f", _NAN if value != value else struct.pack("<d", value))


@handles(complex)
def _complex(encoder: Encoder, value: complex, path: str) -> None:
    encoder.head(b"c", 2)
    _float(encoder, value.real, path)
    _float(encoder, value.imag, path)


@handles(str)
def _str(encoder: Encoder, value: str, path: str) -> None:
    encoder.raw(b"s", value.encode("utf-8", "surrogatepass"))


@handles(bytes)
def _bytes(encoder: Encoder, value: bytes, path: str) -> None:
    encoder.raw(b"b", value)


@handles(bytearray)
def _bytearray(encoder: Encoder, value: bytearray, path: str) -> None:
    encoder.raw(b"B", memoryview(value))


_ATOMS = frozenset({_none, _bool, _int, _float, _complex, _str, _bytes, _bytearray})


@handles(list)
def _list(encoder: Encoder, value: list[object], path: str) -> None:
    _items(encoder, b"l", value, path)


@handles(tuple)
def _tuple(encoder: Encoder, value: tuple[object, ...], path: str) -> None:
    _items(encoder, b"t", value, path)


def _items(
    encoder: Encoder, tag: bytes, value: list[object] | tuple[object, ...], path: str
) -> None:
    encoder.head(tag, len(value))
    for number, item in enumerate(value):
        encoder.value(item, f"{path}[{number}]")


@handles(dict)
def _dict(encoder: Encoder, value: dict[object, object], path: str) -> None:
    encoder.head(b"d", len(value))
    for key, item in value.items():
        encoder.value(key, f"{path}.<key>")
        encoder.value(item, f"{path}[{key!r}]")


@handles(set)
def _set(encoder: Encoder, value: set[object], path: str) -> None:
    _unordered(encoder, b"S", value, path)


@handles(frozenset)
def _frozenset(encoder: Encoder, value: frozenset[object], path: str) -> None:
    _unordered(encoder, b"Z", value, path)


def _unordered(
    encoder: Encoder, tag: bytes, value: set[object] | frozenset[object], path: str
) -> None:
    encoder.head(tag, len(value))
    for name in sorted(digest(item, path=f"{path}.<item>") for item in value):
        encoder.raw(b"s", name.encode())
