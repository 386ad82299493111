"""How long samples take to load, measured where they are loaded, and what takes it.

Loader processes write to a page of shared memory that the training process reads: seconds and
samples of every few batches, and once, where a sample takes long, the function it is spent in.
"""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import struct
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

ADVISE_S = 0.020
# Of the time of steps: below it a slow sample holds nothing up.
ADVISE_WAIT_SHARE = 0.05

_EVERY = 8  # batches of a process from one that is measured to the next
_HEAD = struct.Struct("<qqq")  # nanoseconds, samples, length of the name
_PAGE_BYTES = 512
# A function is to blame if so much of its caller's time is spent in it.
_DOMINANT = 0.6


class LoadingTimes:
    """The page. It travels to loader processes with the dataset, forked or spawned."""

    def __init__(self) -> None:
        self._page = torch.zeros(_PAGE_BYTES, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # no /dev/shm: then processes measure in vain
            self._page.share_memory_()
        self._seen = 0
        self._named = False

    def load(self, num_samples: int, read: Callable[[], Any]) -> Any:
        """Return what `read` returns; now and then, measure it."""
        self._seen += 1
        if self._seen % _EVERY != 1:
            return read()
        begun_ns = time.monotonic_ns()
        slow = not self._named and self.seconds_a_sample() >= ADVISE_S
        if slow:
            self._named = True
            value, name = _profiled(read)
        else:
            value, name = read(), ""
        self._add(time.monotonic_ns() - begun_ns, num_samples, name)
        return value

    def seconds_a_sample(self) -> float:
        """Return the mean over what was measured; 0 where nothing was."""
        spent_ns, samples, _ = self._head()
        return spent_ns / 1e9 / samples if samples else 0.0

    def slowest(self) -> str:
        """Return where most of the time goes; "" where that is not known (yet)."""
        length = self._head()[2]
        data = self._bytes()[_HEAD.size : _HEAD.size + length]
        return data.decode(errors="replace")

    def _add(self, spent_ns: int, samples: int, name: str) -> None:
        # Loader processes may do so at once: then one of the measurements is lost.
        old_ns, old_samples, length = self._head()
        page = self._page.numpy()
        if name:
            text = name.encode()[: _PAGE_BYTES - _HEAD.size]
            page[_HEAD.size : _HEAD.size + len(text)] = memoryview(text)
            length = len(text)
        head = _HEAD.pack(old_ns + spent_ns, old_samples + samples, length)
        page[: _HEAD.size] = memoryview(head)

    def _head(self) -> tuple[int, int, int]:
        spent_ns, samples, length = _HEAD.unpack(self._bytes()[: _HEAD.size])
        return spent_ns, samples, min(max(length, 0), _PAGE_BYTES - _HEAD.size)

    def _bytes(self) -> bytes:
        return self._page.numpy().tobytes()


def _profiled(read: Callable[[], Any]) -> tuple[Any, str]:
    profile = cProfile.Profile()
    try:
        profile.enable()
    except ValueError:  # another profiler is at work
        return read(), ""
    try:
        value = read()
    finally:
        profile.disable()
    with contextlib.suppress(Exception):  # a name is no reason to lose a batch
        return value, blame(pstats.Stats(profile))
    return value, ""


def blame(stats: pstats.Stats) -> str:
    """Return the function in which most of a profile's time is spent.

    From the outermost function on, the callee that takes most of its caller's time, as long as one
    does: so the transform is named, not the collection of transforms and not what it calls inside
    a library.
    """
    table: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    callees: dict[Any, dict[Any, float]] = {}
    for function, row in table.items():
        for caller, numbers in row[4].items():
            callees.setdefault(caller, {})[function] = numbers[3]
    roots = [f for f, row in table.items() if not row[4] and f[0] not in ("~", __file__)]
    if not roots:
        roots = [f for f in table if f[0] not in ("~", __file__)]
    current = max(roots, key=lambda f: table[f][3])
    found, seen = current, {current}
    while True:
        inner = callees.get(current, {})
        inner = {f: spent for f, spent in inner.items() if f not in seen}
        if not inner:
            break
        heaviest = max(inner, key=lambda f: inner[f])
        if inner[heaviest] < _DOMINANT * table[current][3]:
            break
        seen.add(heaviest)
        current = heaviest
        if heaviest[0] != "~" and "site-packages" not in heaviest[0]:
            found = heaviest
    path, line, name = found
    within = f", in {current[2]}" if current is not found else ""
    return f"{name} ({path.rpartition('/')[2]}:{line}){within}"
