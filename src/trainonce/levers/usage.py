"""What a training run used: FLOPs, processor time, wall time, energy, samples and tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from trainonce.levers.flops import FlopCache

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Sequence

    from trainonce.ledger.energy import Meter as EnergyMeter

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What was used.

    Args:
        flops: Of matrix products, convolutions and attention.
        cpu_s: Processor seconds of this process, over all its threads.
        wall_s: Seconds by the clock. On a machine that others use too, they say little.
        energy_j: Joules of the whole host's devices; None where nothing measures them.
        samples: Samples trained on, repeats included.
        tokens: Tokens trained on, repeats included.
        steps: Updates.
    """

    flops: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    energy_j: float | None = None
    samples: int = 0
    tokens: int = 0
    steps: int = 0

    def to_record(self) -> dict[str, Any]:
        """Return the usage as plain values."""
        return dataclasses.asdict(self)

    def rates(self, peak_flops: float | None = None) -> dict[str, float]:
        """Return samples, tokens and FLOPs per second, and `mfu` where the peak is known."""
        wall_s = max(self.wall_s, 1e-9)
        found = {
            "samples_per_s": self.samples / wall_s,
            "tokens_per_s": self.tokens / wall_s,
            "flops_per_s": self.flops / wall_s,
        }
        if peak_flops:
            found["mfu"] = found["flops_per_s"] / peak_flops
        return found


def add_usage(usages: Sequence[Usage]) -> Usage:
    """Return the sum; energy is None unless every part was measured."""
    total: dict[str, Any] = {}
    for each in dataclasses.fields(Usage):
        values = [getattr(usage, each.name) for usage in usages]
        total[each.name] = None if None in values else sum(values)
    return Usage(**total)


class UsageMeter:
    """Adds up what training uses; evaluation, set-up and reading of data stay outside.

    ::

        with meter.running():
            loss = meter.step(("train", x.shape), lambda: train_step(x, y), samples=len(x))

    Args:
        device: Where the work is done; an accelerator is waited for before a clock is read.
        energy: Measures joules; `trainonce.ledger.energy.open_meter()` finds one. An estimate
            is not taken for a measurement.
    """

    def __init__(
        self, device: torch.device | str = "cpu", energy: EnergyMeter | None = None
    ) -> None:
        self._device = torch.device(device)
        self._energy = None if energy is None or energy.is_estimate else energy
        self._cache = FlopCache()
        self._flops = self._samples = self._tokens = self._steps = 0
        self._cpu_s = self._wall_s = self._energy_j = 0.0

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Count time and energy while the block runs."""
        begun_j = self._energy.read_j() if self._energy else 0.0
        begun_cpu_s = time.process_time()
        with stopwatch(self._device) as elapsed:
            yield
        self._wall_s += elapsed()
        self._cpu_s += time.process_time() - begun_cpu_s
        if self._energy:
            self._energy_j += self._energy.read_j() - begun_j

    def step(
        self, key: Hashable, function: Callable[[], T], *, samples: int = 0, tokens: int = 0
    ) -> T:
        """Call `function`, a whole update, and count it. `key` as in `FlopCache.call`."""
        value, flops = self._cache.call(key, function)
        self._flops += flops
        self._samples += samples
        self._tokens += tokens
        self._steps += 1
        return value

    def total(self) -> Usage:
        """Return what was used so far."""
        return Usage(
            flops=self._flops,
            cpu_s=self._cpu_s,
            wall_s=self._wall_s,
            energy_j=self._energy_j if self._energy else None,
            samples=self._samples,
            tokens=self._tokens,
            steps=self._steps,
        )


@contextlib.contextmanager
def stopwatch(device: torch.device) -> Generator[Callable[[], float]]:
    """Time the block; the yielded function returns its seconds once it has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun_s = time.perf_counter()
    ended_s = begun_s
    yield lambda: ended_s - begun_s
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ended_s = time.perf_counter()


def measure_peak_flops(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    size: int = 1024,
    repeats: int = 5,
) -> float:
    """Return FLOPs per second of a square matrix product, the best of `repeats`.

    The denominator of a model's FLOPs utilisation where no data sheet is at hand: it is what
    this device reaches, with the threads that torch may use, and not what is printed on it.
    """
    left = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(repeats + 1):  # the first call warms up
        with stopwatch(torch.device(device)) as elapsed:
            torch.mm(left, left)
        best = max(best, 2 * size**3 / max(elapsed(), 1e-9))
    return best
