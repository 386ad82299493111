"""A file of finished runs, so that a long study can be stopped and goes on where it was."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch

from trainonce.levers.compare import Trained
from trainonce.levers.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from trainonce.levers.harness import Recipe, Task


class Journal:
    """Finished runs as lines of JSON, each under everything that its result depends on.

    A line that was cut short, because the process died while it wrote, counts as not there.

    Args:
        path: Made when the first run is added.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Trained] = {}
        self._whole = True
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = trained_from(entry["run"])
            except (ValueError, KeyError, TypeError):
                continue
        self._whole = not text or text.endswith("\n")

    def __len__(self) -> int:
        return len(self._known)

    def get_or_train(
        self, task: Task, recipe: Recipe, seed: int, split: str, train: Callable[[], Trained]
    ) -> Trained:
        """Return the run that the file holds, else call `train` and add what it returns."""
        key = _key(task, recipe.settings, seed, split)
        if key not in self._known:
            trained = train()
            self._add(key, trained)
            self._known[key] = trained
        return self._known[key]

    def _add(self, key: str, trained: Trained) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "run": trained.to_record()}, allow_nan=False)
        with self._path.open("a") as file:
            file.write(("" if self._whole else "\n") + line + "\n")
        self._whole = True


def trained_from(record: Mapping[str, Any]) -> Trained:
    """Return the run of which `Trained.to_record` made `record`; what is None was not finite."""

    def number(value: float | None) -> float:
        return math.inf if value is None else float(value)

    return Trained(
        seed=int(record["seed"]),
        loss=number(record["loss"]),
        metrics={name: number(value) for name, value in record["metrics"].items()},
        usage=Usage(**record["usage"]),
    )


def _key(task: Task, settings: Mapping[str, Any], seed: int, split: str) -> str:
    parts = {
        "task": [task.name, task.settings()],
        "recipe": dict(settings),
        "seed": seed,
        "split": split,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))
