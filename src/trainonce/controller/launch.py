"""From options to a running job: ids, folders, and the parts put together."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.clock import SystemClock
from trainonce.controller.control_socket import ControlServer
from trainonce.controller.costs import Costs, EnergyThread
from trainonce.controller.job import Job
from trainonce.controller.live import LiveView
from trainonce.controller.logs import LogFiles
from trainonce.controller.store import TorchStore
from trainonce.controller.supervisor import Supervisor
from trainonce.engines.local import LocalEngine
from trainonce.errors import ConfigError
from trainonce.fleet.feed import open_for
from trainonce.ledger.energy import open_meter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trainonce.controller.job import Ledger
    from trainonce.controller.options import RunOptions
    from trainonce.events import BudgetCrossed


_SHOWN_FAULTS = 5


def new_job_id() -> str:
    """Return a short id that sorts by time and is unique: "1120-2101-k3f9"."""
    now = datetime.datetime.now(tz=datetime.UTC)
    letters = "abcdefghjkmnpqrstuvwxyz23456789"
    return f"{now:%m%d-%H%M%S}-{''.join(secrets.choice(letters) for _ in range(4))}"


def resume_folder(options: RunOptions) -> str:
    """Return the checkpoint folder that `--resume` names; empty for none.

    Raises:
        ConfigError: There is none.
    """
    if not options.resume:
        return ""
    for folder in (settings.home() / "jobs" / options.resume / "checkpoints",
                   Path(options.resume)):  # fmt: skip
        if folder.is_dir():
            return str(folder)
    raise ConfigError(
        f"--resume {options.resume}: there is neither a job of that id with checkpoints nor a"
        " folder of that name",
        hint=f"jobs are kept in {settings.home() / 'jobs'}",
    )


def run_job(options: RunOptions, ledger: Ledger, *, crossed: Iterable[BudgetCrossed] = ()) -> int:
    """Run one job on this host and return the exit code of `trainonce run`.

    Call it from the main thread of a process: it handles signals.

    Args:
        options: What to run.
        ledger: Keeps the events.
        crossed: Thresholds of budgets that an earlier part of this job has crossed.

    Raises:
        ConfigError: Options, script, port or folders cannot be used; nothing was started.
    """
    job_id = options.job or new_job_id()
    folder = settings.home() / "jobs" / job_id
    resume = resume_folder(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}",
            hint=f"set {settings.HOME.name} to a folder of yours",
        ) from error
    clock = SystemClock()
    live = LiveView(sys.stderr, clock)
    with (
        contextlib.closing(live),
        contextlib.closing(ControlServer(job_id)) as control,
        contextlib.closing(TorchStore(options.master_port)) as store,
    ):
        job = Job(
            options,
            job_id=job_id,
            folder=folder,
            engine=LocalEngine(),
            clock=clock,
            ledger=ledger,
            view=live,
            logs=LogFiles(options, folder / "logs", job_id, live.say),
            store=store,
            resume=resume,
        )
        live.say(_first_line(options, job))
        for notice in options.notices:
            live.say(f"note: {notice}")
        feed = None
        if not options.health.is_off:
            feed = open_for(options.health, host=job.engine.host, clock=clock, disk=folder)
        supervisor = Supervisor(
            job, live=live, control=control, health=feed and (feed, options.health)
        )
        supervisor.costs = Costs(
            job,
            supervisor.ending,
            economics=options.economics,
            project=settings.PROJECT.get() or "default",
            energy=EnergyThread(lambda: open_meter(_nvml_indices())),
            crossed=crossed,
        )
        code = supervisor.run()
        live.say(last_line(job, code))
        return code


def _nvml_indices() -> list[int] | None:
    """Return the devices that this job may use, in NVML's order; None for all of the host."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    if visible is None or not all(part.strip().isdigit() for part in visible.split(",")):
        return None
    return [int(part) for part in visible.split(",")]


def _first_line(options: RunOptions, job: Job) -> str:
    ranks = f"{options.nproc} rank{'s' if options.nproc != 1 else ''}"
    spares = f", {options.spares} spare{'s' if options.spares != 1 else ''}"
    threads = ""
    if options.nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = ", OMP_NUM_THREADS=1 (set it to choose)"
    found = job.find_resume()
    resume = f", from {found}" if found else ""
    return f"job {job.id}: {ranks}{spares if options.spares else ''}{resume}{threads}"


def last_line(job: Job, code: int) -> str:
    """Return the launcher's last word on `job`."""
    reason = f": {job.reason}" if job.reason else ""
    incidents = job.incidents.total
    after = f", {incidents} incident{'s' if incidents != 1 else ''}" if incidents else ""
    steps = f" after {job.step} step{'s' if job.step != 1 else ''}" if job.step else ""
    missed = ""
    if job.unfired:
        some = ", ".join(f'"{fault}"' for fault in job.unfired[:_SHOWN_FAULTS])
        some += ", …" if len(job.unfired) > _SHOWN_FAULTS else ""
        missed = f", {len(job.unfired)} of {len(job.options.chaos)} faults did not fire ({some})"
    return f"job {job.id} {job.outcome}{steps}{after}{missed}, exit code {code}{reason}"
