"""The numerics in force: what decides the bits of a result beside code and inputs."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

MODES = ("exact", "tolerant")

# What torch starts with, so that a process that has not imported it has the same keys.
_DEFAULTS = {
    "dtype": "float32",
    "autocast": "off",
    "matmul precision": "highest",
    "tf32": "False True",
    "deterministic": "False",
    "cudnn": "False False",
}


def numerics(mode: str, threads: int = 1) -> dict[str, str]:
    """Return the numerics that belong to an action key.

    Args:
        mode: "tolerant" takes the flags of torch, so that hosts share; "exact" adds the device
            model, the build of torch and the thread count, which decide the last bits.
        threads: Of the node; counts in exact mode.
    """
    fields = _flags() if "torch" in sys.modules else dict(_DEFAULTS)
    if mode == "exact":
        fields |= _machine(threads)
    return fields


def _flags() -> dict[str, str]:
    import torch

    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    autocast = [f"{kind} {torch.get_autocast_dtype(kind)}" for kind in kinds]
    backends: Any = torch.backends
    return {
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "autocast": ", ".join(autocast) or "off",
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": f"{backends.cuda.matmul.allow_tf32} {backends.cudnn.allow_tf32}",
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "cudnn": f"{backends.cudnn.deterministic} {backends.cudnn.benchmark}",
    }


def _machine(threads: int) -> dict[str, str]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "device": ", ".join(sorted(set(devices))) or _cpu_model(),
        "torch build": torch.__config__.show(),
        "threads": str(threads),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


@contextlib.contextmanager
def pinned_threads(threads: int | None) -> Generator[None]:
    """Let torch use this many threads in the calling thread; None leaves it as it is."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
