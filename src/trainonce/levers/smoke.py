"""Two batches of the real script on the CPU, before anything expensive starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.errors import SmokeTestError
from trainonce.levers.base import LeverInfo, describes
from trainonce.settings import ALL, HOME

if TYPE_CHECKING:
    from collections.abc import Sequence

_LAST_LINES = 20
# What a launcher sets for its workers; the smoke test is a job of one.
_LAUNCHER = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SmokeResult:
    """What the first batches showed.

    Args:
        num_steps: Updates that were made.
        inputs: For each, the shapes of tensors given to the outermost module first called.
        num_parameters: Elements of all parameters that an optimizer steps.
        state_bytes: Parameters, gradients and optimizer state: what a device must hold
            beside activations.
        peak_rss_bytes: Most memory that the process held, the interpreter included.
    """

    num_steps: int
    inputs: list[list[list[int]]]
    num_parameters: int
    state_bytes: int
    peak_rss_bytes: int


@describes(
    LeverInfo(
        name="smoke",
        saves="the start of a cluster for a run that fails in its first step",
        source="common practice",
        applies="always; seconds on one CPU",
        hurts="scripts that name a device instead of asking for one, and models too large for "
        "the host's memory",
        reversible=True,
        default_on=True,
    )
)
def smoke_test(
    script: str | Path,
    args: Sequence[str] = (),
    *,
    steps: int = 2,
    epoch: bool = False,
    max_state_bytes: int | None = None,
    timeout_s: float | None = 600.0,
) -> SmokeResult:
    """Run `script` on the CPU until its optimizer has made `steps` updates, and stop it there.

    It runs in a process of its own, with no CUDA device in sight, as a job of one, and with a
    folder of its own for what trainonce writes. Nothing in the script has to know of it;
    what it writes itself before its second update, it writes.

    Args:
        script: Path of the training script.
        args: Its arguments.
        steps: Updates to make.
        epoch: Instead, go on to the end of the first pass over a torch loader (or one of
            `run.dataloader`) in which updates were made.
        max_state_bytes: Memory of the device it is meant for. State beyond it fails here.
        timeout_s: It fails if it takes longer; None: as long as it takes.

    Raises:
        SmokeTestError: The script fails, ends without an update, makes a parameter that is not
            finite, takes too long, or its state exceeds `max_state_bytes`.
    """
    with tempfile.TemporaryDirectory(prefix="trainonce-smoke-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "trainonce.levers.smoke_child"]
        command += [str(report), "0" if epoch else str(steps), str(script), *args]
        try:
            done = subprocess.run(
                command,
                env=_environment(folder),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SmokeTestError(
                f"{script} did not finish {'an epoch' if epoch else f'{steps} updates'} on the CPU "
                f"within {timeout_s:g} s",
                hint="raise timeout_s, or give the script a smaller model for the test",
            ) from error
        found = json.loads(report.read_text()) if report.exists() else None
    if done.returncode or found is None:
        raise SmokeTestError(_failure(script, done), hint=_hint(done.stderr))
    return _checked(script, found, max_state_bytes)


def _checked(script: str | Path, found: dict[str, Any], max_state_bytes: int | None) -> SmokeResult:
    bad = found.pop("not_finite")
    if bad:
        raise SmokeTestError(
            f"{script}: {bad} of its parameters are not finite after {found['num_steps']} updates",
            hint="a lower learning rate, or a look at the loss",
        )
    if not found["num_steps"]:
        raise SmokeTestError(
            f"{script} ended without a step of a torch optimizer",
            hint="give it the arguments with which it trains",
        )
    if max_state_bytes is not None and found["state_bytes"] > max_state_bytes:
        raise SmokeTestError(
            f"{script} holds {found['state_bytes']} bytes of parameters, gradients and optimizer "
            f"state, and the device has {max_state_bytes}",
            hint="shard it (FSDP2), or take a smaller model",
        )
    return SmokeResult(**found)


def _environment(folder: str) -> dict[str, str]:
    dropped = {*_LAUNCHER, *(variable.name for variable in ALL)}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", HOME.name: folder}


def _failure(script: str | Path, done: subprocess.CompletedProcess[str]) -> str:
    how = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    last = "\n".join(done.stderr.splitlines()[-_LAST_LINES:])
    return f"{script} failed on the CPU ({how}):\n{last}"


def _hint(stderr: str) -> str:
    if "CUDA" in stderr or "NVIDIA" in stderr:
        return "use run.device instead of naming a CUDA device"
    return "run it on one CPU to see the whole output"
