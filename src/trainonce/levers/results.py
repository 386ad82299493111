"""Result files of studies: everything needed to repeat one, and the tables and plots of it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import ConfigError
from trainonce.levers.harness import RERUNS, Arm, StudyResult, saved_with_tuning

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
_PACKAGES = ("trainonce", "torch", "numpy", "scipy", "scikit-learn")


def to_record(result: StudyResult, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study's result as plain values.

    Args:
        result: Of `run_study`.
        options: Of `trainonce bench levers`, which repeat it.
    """
    study = result.study
    recipes = (study.default, *study.baseline, *study.candidate)
    return {
        "format": FORMAT,
        "options": dict(options),
        "environment": environment(),
        "task": {
            "name": study.task.name,
            "metric": study.task.metric,
            "margin": study.task.margin,
            **study.task.settings(),
        },
        "tuning_seeds": list(study.tuning_seeds),
        "reporting_seeds": list(study.reporting_seeds),
        "recipes": {recipe.name: recipe.settings for recipe in recipes},
        "tuning": {name: [run.to_record() for run in runs] for name, runs in result.tuning.items()},
        "arms": [_arm_record(arm, result.arms) for arm in result.arms.values()],
        "notes": result.notes,
    }


def _arm_record(arm: Arm, arms: dict[str, Arm]) -> dict[str, Any]:
    accounts: dict[str, dict[str, float | None]] = {}
    for reference in ("default", "tuned"):
        if reference != arm.role:
            accounts[reference] = {
                f"{kind}, {reruns} run{'s' * (reruns > 1)} and tuning": saved_with_tuning(
                    arms[reference], arm, reruns, kind
                )
                for kind in ("flops", "cpu_s")
                for reruns in RERUNS
            }
    return {
        "role": arm.role,
        "recipe": {"name": arm.recipe.name, **arm.recipe.settings},
        "tuning_usage": arm.tuning.to_record(),
        "runs": [run.to_record() for run in arm.runs],
        "against_default": arm.against_default and arm.against_default.to_record(),
        "against_tuned": arm.against_tuned and arm.against_tuned.to_record(),
        "saved_with_tuning": accounts,
    }


def environment() -> dict[str, Any]:
    """Return what the figures depend on beside the study: versions, hardware, threads."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def write(record: dict[str, Any], folder: Path, hardware: str) -> Path:
    """Write `record` to `<date>_<hardware>_<commit>_<task>[-size].json`; return the path."""
    env, size = record["environment"], record["options"].get("size", "medium")
    task = record["task"]["name"] + ("" if size == "medium" else f"-{size}")
    name = f"{env['date']}_{hardware}_{env['commit']}_{task}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the record in `path`.

    Raises:
        ConfigError: It cannot be read, or is no result of this format.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"{path} is no result of format {FORMAT}", hint="measure it again")
    return record  # pyright: ignore[reportUnknownVariableType]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return "installed"


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
