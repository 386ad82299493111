"""The tasks on which levers are measured, and what is compared on each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.levers.harness import Study

if TYPE_CHECKING:
    from collections.abc import Sequence

# Name -> (module with `default`, `baseline` and `candidates`, class of the task).
TASKS = {
    "digits": ("trainonce.levers.bench.digits", "Digits"),
    "bytes": ("trainonce.levers.bench.stdlib_bytes", "StdlibBytes"),
    "finetune": ("trainonce.levers.bench.finetune", "Finetune"),
    "cartpole": ("trainonce.levers.bench.cartpole", "CartPole"),
    "acrobot": ("trainonce.levers.bench.acrobot", "Acrobot"),
}
GRIDS = ("small", "full")
SIZES = ("small", "medium", "large")
_WIDTHS = {"digits": ("width", (4, 8, 16)), "bytes": ("dim", (16, 32, 64))}
_WIDTHS["finetune"] = _WIDTHS["digits"]
_WIDTHS["cartpole"] = _WIDTHS["acrobot"] = ("width", (32, 64, 128))


def make_study(
    task: str,
    *,
    grid: str = "full",
    size: str = "medium",
    split_seed: int = 0,
    tuning_seeds: Sequence[int] = (100, 101, 102),
    reporting_seeds: Sequence[int] = (0, 1, 2, 3, 4),
) -> Study:
    """Return the study of a task.

    Args:
        task: One of `TASKS`.
        grid: How many recipes to choose from: "small" or "full".
        size: Of the model: "small", "medium" or "large"; each is twice as wide as the last.
        split_seed: Which data are for training, tuning and reporting.
        tuning_seeds: For the choices.
        reporting_seeds: For what is reported.

    Raises:
        ConfigError: There is no such task, grid or size, or the seeds do not fit.
    """
    if task not in TASKS or grid not in GRIDS or size not in SIZES:
        raise ConfigError(
            f"there is no task {task!r} with a grid {grid!r} and a size {size!r}",
            hint=f"tasks: {', '.join(TASKS)}; grids: {', '.join(GRIDS)}; sizes: {', '.join(SIZES)}",
        )
    name, cls = TASKS[task]
    module = importlib.import_module(name)
    argument, widths = _WIDTHS[task]
    chosen: dict[str, Any] = {argument: widths[SIZES.index(size)]}
    return Study(
        task=getattr(module, cls)(split_seed=split_seed, **chosen),
        default=module.default(),
        baseline=module.baseline(grid),
        candidate=module.candidates(grid),
        tuning_seeds=tuning_seeds,
        reporting_seeds=reporting_seeds,
    )
