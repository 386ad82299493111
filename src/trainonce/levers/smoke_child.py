"""The process in which a smoke test runs its script: `REPORT STEPS SCRIPT [ARGS...]`.

torch's global hooks see every optimizer step and every call of a module, whatever loop the
script has. With STEPS 0 it goes on until a loader that trained something is exhausted.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Enough(BaseException):
    """Ends the script after its last update; no `except Exception` in it stops that."""


class _Watch:
    """Counts updates, and remembers what the first modules were given."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._updates: Counter[int] = Counter()
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._current: list[list[int]] | None = None
        self.inputs: list[list[list[int]]] = []

    def on_forward(self, _module: torch.nn.Module, args: Any) -> None:
        if self._current is None:
            self._current = [list(a.shape) for a in args if isinstance(a, torch.Tensor)]

    def on_update(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._optimizers[id(optimizer)] = optimizer
        self._updates[id(optimizer)] += 1
        if self._current is not None:
            self.inputs.append(self._current)
            self._current = None
        if 0 < self._steps <= self.num_steps:
            raise _Enough

    def until_a_loader_ends(self) -> None:
        """End the script with the first pass over a loader in which something was trained."""
        plain = DataLoader.__iter__

        def walk(loader: DataLoader[Any]) -> Iterator[Any]:
            before = self.num_steps
            yield from plain(loader)
            if self.num_steps > before:
                raise _Enough

        DataLoader.__iter__ = walk  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def num_steps(self) -> int:
        return max(self._updates.values(), default=0)

    def report(self) -> dict[str, Any]:
        parameters = {
            id(parameter): parameter
            for optimizer in self._optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }.values()
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        tensors += [
            value
            for optimizer in self._optimizers.values()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        # Kibibytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "num_steps": self.num_steps,
            "inputs": self.inputs,
            "num_parameters": sum(p.numel() for p in parameters),
            "state_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "not_finite": sum(not bool(torch.isfinite(p).all()) for p in parameters),
        }


def main() -> None:
    """Run the script until it has made its updates, and write the report."""
    report, steps, script, *args = sys.argv[1:]
    watch = _Watch(int(steps))
    register_optimizer_step_post_hook(watch.on_update)
    register_module_forward_pre_hook(watch.on_forward)
    if steps == "0":
        watch.until_a_loader_ends()
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).resolve().parent)
    enough = False
    try:
        runpy.run_path(script, run_name="__main__")
    except _Enough:
        enough = True
    Path(report).write_text(json.dumps(watch.report()))
    if enough:
        # The script did not end by itself, so its exit handlers have nothing sensible to do.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
