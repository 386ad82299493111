"""Completion time with a SIGKILL every 50 steps, against the same run without.

Three kinds of run take turns: without faults; with a *spare* killed every 50 steps, so that
new workers start as often but no rank is touched; and with a rank killed. The second tells the
cost of starting workers on this machine, where they compete with the ranks for the cores, from
that of the failures. Time counts from the tenth committed step to the last, on rank 0 or who
took it over; every run must end with the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import (
    LAUNCHER,
    default_hardware,
    incidents,
    read_records,
    result_path,
    run_job,
    summary,
    table,
    write_result,
)

HERE = Path(__file__).resolve().parent
_FROM_STEP = 10


def plan(kind: str, steps: int, every: int) -> str:
    at = range(every, steps, every)
    if kind == "ranks killed":
        # At the end of the backward pass, where most of the dead rank's share is done.
        return "; ".join(
            f"kill rank={turn % 2} step={step} point=reduced" for turn, step in enumerate(at)
        )
    return "; ".join(f"kill_spare step={step}" for step in at) if kind == "spares killed" else ""


def run_once(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = f"faulted-{os.getpid()}"
        text = run_job(
            [*LAUNCHER, "--nproc-per-node", "2", "--spares", "1", "--job-id", job,
             "--chaos", plan(kind, args.steps, args.every), str(HERE / "train.py")],
            MODEL=args.model, STEPS=args.steps, STEPS_FILE=folder / "steps", TRAINONCE_HOME=folder,
        )  # fmt: skip
        records = [record for record in read_records(folder / "steps") if record.rank == 0]
        found = incidents(folder, job)
    times = {record.step: record.at_s for record in records}
    return {
        "seconds": times[args.steps] - times[_FROM_STEP],
        "digests": sorted(set(text.split())),
        "incidents": len(found),
        "pauses_s": [incident["pause_s"] for incident in found],
        "waited_for_spare_s": sum(incident["waited_for_spare_s"] for incident in found),
        "steps_lost": sum(incident["steps_lost"] for incident in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--model", default="gpt:128:4:16")
    parser.add_argument("--hardware", default=default_hardware())
    args = parser.parse_args()
    path = result_path(__file__, args.hardware)
    runs: dict[str, list[Any]] = {"no faults": [], "spares killed": [], "ranks killed": []}
    for _ in range(args.repeats):
        for kind, found in runs.items():
            found.append(run_once(kind, args))
            print(kind, json.dumps(found[-1]), flush=True)
        result = judge(runs, args)
        write_result(path, {"config": vars(args), "runs": runs, **result})
    rows = [
        [name, f"{found['median']:.3f}", f"{found['min']:.3f} to {found['max']:.3f}"]
        for name, found in result["ratios"].items()
    ]
    print(table([["ratio", "median", "range"], *rows]))
    print("same bits:", result["all_bits_equal"])


def judge(runs: dict[str, list[Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Compare the kinds of run, and the pauses of the ledger with the time of training."""
    kills = len(range(args.every, args.steps, args.every))
    assert all(one["incidents"] == kills for one in runs["ranks killed"]), "a kill did not fire"
    calm, spares, faulted = ([one["seconds"] for one in found] for found in runs.values())
    pauses = [sum(one["pauses_s"]) for one in runs["ranks killed"]]
    # Each kill has the dead rank's share of one step computed again.
    share = [one * kills / (args.steps - _FROM_STEP) for one in calm]
    ratios = {
        "faulted over fault-free": [a / b for a, b in zip(faulted, calm, strict=True)],
        "beyond the dead rank's share": [
            (a - s) / b for a, b, s in zip(faulted, calm, share, strict=True)
        ],
        "new workers alone over fault-free": [a / b for a, b in zip(spares, calm, strict=True)],
        "faulted over new workers alone, beyond the share": [
            (a - s) / b for a, b, s in zip(faulted, spares, share, strict=True)
        ],
        "pauses beyond the share, over the time without them": [
            1 + (p - s) / (a - p) for a, p, s in zip(faulted, pauses, share, strict=True)
        ],
        "noise: fault-free over the median": [one / statistics.median(calm) for one in calm],
    }
    digests = {digest for found in runs.values() for one in found for digest in one["digests"]}
    return {
        "kills_a_run": kills,
        "ratios": {name: summary(values) for name, values in ratios.items()},
        "all_bits_equal": len(digests) == 1,
    }


if __name__ == "__main__":
    main()
