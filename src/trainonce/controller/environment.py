"""The command and the environment of a worker: those of torchrun, and ours."""

from __future__ import annotations

import os
import string
import sys
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from trainonce.controller.options import RunOptions


def command(options: RunOptions, rank: int) -> tuple[str, ...]:
    """Return the command line of a worker; `rank` is -1 for a spare."""
    args = options.script_args
    if rank >= 0:
        args = tuple(string.Template(a).safe_substitute(local_rank=str(rank)) for a in args)
    if options.no_python:
        return (options.script, *args)
    python = os.environ.get("PYTHON_EXEC") or sys.executable
    module = ("-m",) if options.module else ()
    return (python, "-u", "-m", "trainonce.worker", *module, options.script, *args)


def environment(
    options: RunOptions, *, job: str, worker: int, rank: int, slot: int, incarnation: int,
    store_port: int, max_restarts: int,
) -> dict[str, str]:  # fmt: skip
    """Return the environment of a worker; `rank` is -1 for a spare.

    A spare gets what is true of every rank and nothing that tells one rank from another.
    """
    nproc = str(options.nproc)
    env = {
        **os.environ,
        "LOCAL_WORLD_SIZE": nproc,
        "WORLD_SIZE": nproc,
        "ROLE_WORLD_SIZE": nproc,
        "ROLE_NAME": options.role,
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store_port),
        "TORCHELASTIC_RESTART_COUNT": str(incarnation),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_RUN_ID": options.run_id or job,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        settings.JOB.name: job,
        settings.WORKER.name: str(worker),
        settings.SLOT.name: str(slot),
    }
    if options.redundancy:
        env[settings.REDUNDANCY.name] = str(options.redundancy)
    if options.profile_s:
        env[settings.PROFILE_S.name] = str(options.profile_s)
    env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if options.nproc > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", settings.SPARE.name):
        env.pop(name, None)
    if rank < 0:
        env[settings.SPARE.name] = "1"
        return env
    text = str(rank)
    env |= {"RANK": text, "LOCAL_RANK": text, "GROUP_RANK": "0", "ROLE_RANK": text}
    if options.virtual_local_rank:
        env |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": _device(slot, options.nproc)}
    return env


def _device(slot: int, nproc: int) -> str:
    """Return the device of a slot; beyond what is visible, slots of spares share one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(slot % nproc)
    devices = visible.split(",")
    if len(devices) < nproc:
        raise ConfigError(
            f"rank {nproc - 1} has no device: CUDA_VISIBLE_DEVICES is {visible}",
            hint="lower --nproc-per-node, or leave out --virtual-local-rank",
        )
    return devices[slot % len(devices)].strip()
