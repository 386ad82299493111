r"""A safe and exact binary form of state, without pickle.

`flatten` splits a value into a JSON-able tree and the tensors in it, for callers that move
tensors their own way; `encode` and `decode` make one self-contained piece of bytes of both.

The bytes, format 1, little-endian::

    0    4  magic b"T1E\n"
    4    4  format version
    8    8  length of the header in bytes, a multiple of 64 less 24
    16   8  length of the whole in bytes
    24   .  header: JSON {"tree": …, "tensors": [[dtype, shape, device type], …]}, spaces
    .    .  the tensors' bytes in order, row-major, each padded with zeros to 64 bytes
    -8   8  XXH3-64 of everything before
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import torch
import xxhash

from trainonce.errors import EncodingError
from trainonce.wire.trees import dumps, flatten, torch_dtype, unflatten

__all__ = ["FORMAT", "decode", "encode", "flatten", "unflatten"]

FORMAT = 1
_MAGIC = b"T1E\n"
_PREFIX = struct.Struct("<4sIQQ")
_CHECKSUM = struct.Struct("<Q")
_ALIGN = 64
_FEW = 64
_IN_NUMPY = frozenset((torch.float32, torch.float64, torch.int64, torch.bool))


def encode(value: Any) -> bytes:
    """Return `value` as self-contained bytes.

    Tensors are copied to the CPU, row-major; `requires_grad`, strides and sharing of memory
    between tensors are not kept. Equal values give equal bytes.

    Raises:
        EncodingError: A part has no encoding; the message names its path.
    """
    tree, tensors = flatten(value)
    specs: list[list[Any]] = []
    chunks: list[Any] = []
    for tensor in tensors:
        specs.append([str(tensor.dtype)[6:], list(tensor.shape), tensor.device.type])
        raw = _raw(tensor)
        chunks.append(raw)
        if rest := len(raw) % _ALIGN:
            chunks.append(bytes(_ALIGN - rest))
    try:
        header = dumps({"tree": tree, "tensors": specs}).encode()
    except RecursionError:
        raise EncodingError("the value is nested too deeply", hint="flatten it") from None
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    size = _PREFIX.size + len(header) + sum(map(len, chunks)) + _CHECKSUM.size
    chunks[:0] = (_PREFIX.pack(_MAGIC, FORMAT, len(header), size), header)
    checksum = xxhash.xxh3_64()
    for chunk in chunks:
        checksum.update(chunk)
    chunks.append(_CHECKSUM.pack(checksum.intdigest()))
    return b"".join(chunks)


def decode(data: bytes | bytearray | memoryview, *, device: torch.device | str = "cpu") -> Any:
    """Return the value in `data`, which `encode` made.

    Args:
        data: All of it, and nothing more. Not aliased by the result.
        device: Where tensors go that were not on the CPU when they were encoded.

    Returns:
        The value. Its CPU tensors share one piece of memory that is theirs alone.

    Raises:
        EncodingError: `data` is damaged, cut short, or of another format version.
    """
    if len(data) < _PREFIX.size + _CHECKSUM.size or bytes(data[:4]) != _MAGIC:
        raise EncodingError("not an encoded value: it does not begin as one")
    _magic, version, header_bytes, size = _PREFIX.unpack_from(data)
    if version != FORMAT:
        raise EncodingError(
            f"encoded in format {version}, and this version reads format {FORMAT}",
            hint="read it with the version of trainonce that wrote it",
        )
    if size != len(data):
        raise EncodingError(f"an encoded value of {size} bytes has {len(data)}: it was cut")
    buffer = bytearray(data)
    body = memoryview(buffer)[: -_CHECKSUM.size]
    if xxhash.xxh3_64_intdigest(body) != _CHECKSUM.unpack_from(buffer, len(body))[0]:
        raise EncodingError("an encoded value does not match its checksum: it was damaged")
    try:
        start = _PREFIX.size + header_bytes
        header = json.loads(bytes(body[_PREFIX.size : start]))
        tensors = _read_tensors(header["tensors"], buffer, start, device)
        return unflatten(header["tree"], tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, EncodingError):
            raise
        raise EncodingError(f"not an encoded value: {type(error).__name__}: {error}") from error


def _raw(tensor: torch.Tensor) -> bytes | memoryview:
    """Return the bytes of `tensor` in row-major order, without a copy where it is large."""
    if tensor.numel() <= _FEW and tensor.dtype in _IN_NUMPY:
        if tensor.device.type == "cpu" and not tensor.is_neg():
            return tensor.numpy().tobytes()  # the loss of a step: a view would take longer
    dense = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    # A contiguous tensor of one element may still have any stride, which a view as bytes refuses.
    flat = dense.as_strided((dense.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def _read_tensors(
    specs: list[list[Any]], buffer: bytearray, offset: int, device: torch.device | str
) -> list[torch.Tensor]:
    """Return the tensors that lie in `buffer` from `offset` on, as views of it."""
    tensors: list[torch.Tensor] = []
    for name, shape, device_type in specs:
        dtype = torch_dtype(name)
        count = math.prod(shape)
        if count:
            tensor = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        tensors.append(tensor if device_type == "cpu" else tensor.to(device))
        size = count * dtype.itemsize
        offset += size + -size % _ALIGN
    return tensors
