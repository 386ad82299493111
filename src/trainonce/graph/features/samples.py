"""Digests of samples: by content, or by the key that a dataset declares.

Also the guard that notices samples which are not the same each time they are read.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from blake3 import blake3

from trainonce.errors import DataError
from trainonce.graph.digest import digest
from trainonce.graph.features.segments import DIGEST_BYTES, as_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from numpy.typing import NDArray

    from trainonce.graph.features.selection import Call

RANDOM_HINT = (
    "take the augmentation out (it can act on the features), or store seeded variants of each "
    "sample: features(..., variants=8)"
)


def content_digest(call: Call) -> bytes:
    """Return 16 bytes that name the arguments of one call by content.

    Tensors and arrays of equal dtype, shape and elements are equal, on whatever device and in
    whatever container; other values count by their value digest.
    """
    hasher = blake3(b"sample-1")
    for name, value in call.parts():
        _feed(hasher, name, value)
    return hasher.digest(DIGEST_BYTES)


def array_digests(fields: list[tuple[str, torch.Tensor]]) -> NDArray[np.bytes_]:
    """Return the content digest of every row of some tensors: "S16", shape (n,).

    Equal to `content_digest` of each row's call, without making the calls.
    """
    heads: list[bytes] = []
    data: list[NDArray[np.uint8]] = []
    num_rows = len(fields[0][1])
    for name, tensor in fields:
        heads.append(_head(name, tensor.dtype, tuple(tensor.shape[1:])))
        data.append(as_bytes(tensor.cpu()).reshape(num_rows, -1))
    out = bytearray()
    start = blake3(b"sample-1")
    for row in range(num_rows):
        hasher = start.copy()
        for head, part in zip(heads, data, strict=True):
            hasher.update(head)
            hasher.update(part[row])
        out += hasher.digest(DIGEST_BYTES)
    return np.frombuffer(bytes(out), f"S{DIGEST_BYTES}")


def named_digests(namespace: str, keys: Iterable[object]) -> NDArray[np.bytes_]:
    """Return digests of keys within a namespace: "S16".

    Raises:
        UnhashableError: A key is no plain value.
    """
    out = bytearray()
    for key in keys:
        name = key if isinstance(key, str) else digest(key)
        kind = b"s" if isinstance(key, str) else b"v"
        out += blake3(namespace.encode() + kind + name.encode()).digest(DIGEST_BYTES)
    return np.frombuffer(bytes(out), f"S{DIGEST_BYTES}")


def derived(digests: NDArray[np.bytes_], salt: str) -> NDArray[np.bytes_]:
    """Return other digests made from these, one by one: for chains and variants."""
    raw = digests.tobytes()
    salted = salt.encode()
    out = b"".join(
        blake3(raw[start : start + DIGEST_BYTES] + salted).digest(DIGEST_BYTES)
        for start in range(0, len(raw), DIGEST_BYTES)
    )
    return np.frombuffer(out, f"S{DIGEST_BYTES}")


def _feed(hasher: Any, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        hasher.update(_head(name, value.dtype, tuple(value.shape)))
        hasher.update(as_bytes(value.cpu()))
    else:
        hasher.update(f"{name}=".encode() + digest(value).encode())


def _head(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{name}:{dtype}:{shape};".encode()


# ---------------------------------------------------------------- randomness


def generator_states() -> tuple[object, ...]:
    """Return the states of the global generators of Python, NumPy and torch."""
    legacy: Any = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return (
        random.getstate(),
        (legacy[1].tobytes(), *legacy[2:]),
        torch.get_rng_state().numpy().tobytes(),
        *(state.numpy().tobytes() for state in cuda),
    )


@contextlib.contextmanager
def no_randomness(what: str) -> Generator[None]:
    """Refuse a block that draws from a global generator.

    Raises:
        DataError: It did; `what` says whose outputs are not the same each time.
    """
    before = generator_states()
    yield
    if generator_states() != before:
        raise DataError(f"{what} draws random numbers: a stored result would freeze one draw of "
                        "them", hint=RANDOM_HINT)  # fmt: skip


@contextlib.contextmanager
def seeded(seed: bytes) -> Generator[None]:
    """Run a block with all global CPU generators seeded, and restore them after it."""
    number = int.from_bytes(blake3(seed).digest(8), "little")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
