"""`trainonce ps`: the running jobs of this user on this host."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from trainonce.controller import control_socket
from trainonce.errors import JobNotFoundError, WireError

if TYPE_CHECKING:
    import argparse

_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("job", nargs="?", help="only this job")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the jobs; with a job named, fail if it does not run."""
    if args.job:
        jobs = [control_socket.request(args.job, op="status", timeout_s=_TIMEOUT_S)]
    else:
        jobs = [found for job in control_socket.running_jobs() if (found := _try_status(job))]
    if args.json:
        print(json.dumps(jobs))
        return 0
    if not jobs:
        print("no job is running")
    for job in jobs:
        _show(job)
    return 0


def _try_status(job: str) -> dict[str, Any] | None:
    try:
        return control_socket.request(job, op="status", timeout_s=_TIMEOUT_S)
    except (JobNotFoundError, WireError):
        return None  # it ended between being listed and being asked


def _show(job: dict[str, Any]) -> None:
    print(
        f"{job['job']}  {job['script']}  launcher pid {job['pid']}  step {job['step']}"
        f"  generation {job['generation']}  incidents {job['incidents']}"
    )
    ranks = ", ".join(map(str, job["lost_ranks"]))
    if job["short"]:
        print(f"  waits for a device for rank {ranks}: slot {_slots(job)} is lost")
    elif job["lost_ranks"]:
        print(f"  waits for a worker for rank {ranks}")
    elif job["lost_slots"]:
        print(f"  slot {_slots(job)} is lost")
    print(f"  {'rank':>6}  {'pid':>8}  {'step':>8}  phase")
    for worker in job["workers"]:
        role = "leaves" if worker.get("leaving") else "spare"  # an older launcher does not say
        rank = role if worker["rank"] is None else worker["rank"]
        place = f" ({worker['parked']})" if worker["parked"] else ""
        if worker["guest_of"] is not None:
            place = f" (guest on the device of rank {worker['guest_of']})"
        print(f"  {rank:>6}  {worker['pid']:>8}  {worker['step']:>8}  {worker['phase']}{place}")


def _slots(job: dict[str, Any]) -> str:
    return ", ".join(map(str, job["lost_slots"]))
