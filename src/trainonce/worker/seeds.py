"""Seeds that are derived, not drawn: the same work gets the same random numbers anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Generator

_to_json = json.JSONEncoder(separators=(",", ":")).encode


def derive_seed(purpose: str, *parts: int | str) -> int:
    """Return a 64-bit seed for `purpose`, made of `parts` alone.

    It is the first eight bytes, little-endian, of the BLAKE2b digest of the JSON array
    `[purpose, *parts]`, so seeds of different purposes or parts are unrelated.
    """
    text = _to_json([purpose, *parts])
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"trainonce").digest()
    return int.from_bytes(digest, "little")


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, CUDA's included if it is in use.

    At every step they are set from (seed, rank, step), so that whoever executes a step draws
    the same numbers, and nothing of them has to survive a process.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed Python's, NumPy's and torch's CPU generators; give them back as they were.

    Not for two threads at once: these generators belong to the process.

    Args:
        seed: 64 bits. NumPy's global generator takes the lower 32.
    """
    python_state = random.getstate()
    torch_state = torch.default_generator.get_state()
    numpy_state: Any = np.random.get_state()
    # Changing what is behind NumPy's global functions, and back, costs a thirtieth of
    # setting its state. Only a normal deviate that it keeps for the next call gets lost.
    numpy_bits: Any = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
    np.random.set_bit_generator(_spare_bits(numpy_bits))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        np.random.set_bit_generator(numpy_bits)  # pyright: ignore[reportAttributeAccessIssue]
        if numpy_state[3]:
            np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)


_bits = np.random.MT19937(0)


def _spare_bits(in_use: Any) -> np.random.MT19937:
    """Return bits to seed: one for all, as making them is slow, but not what is in use."""
    return np.random.MT19937(0) if in_use is _bits else _bits
