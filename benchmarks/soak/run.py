"""Random faults without end: every run must end with the bits of its twin without faults.

Draws jobs from a seed: a way to train, two or three ranks, and a plan of random faults at random
steps and points. A job fails if its exit code is not 0, if a rank's end state is not that of the
twin, if committed steps were lost, or if a fault of the plan did not fire. Interrupt it at any
time: `--resume FILE` goes on after the jobs that the result holds.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import (
    LAUNCHER,
    commit,
    default_hardware,
    environment,
    incidents,
    result_path,
    without_paths,
    write_result,
)

HERE = Path(__file__).resolve().parent
KINDS = ("plain", "accumulate", "batchnorm", "scaler", "late collective", "evaluation")
STEPS = 60
EVALUATE_EVERY = 11  # ten steps and an evaluation
_ACTIONS = ("kill", "kill", "kill", "raise", "exit", "stop", "migrate", "reset", "kill_spare")
_POINTS = ("loader", "begin", "forward", "backward", "collective", "reduced", "update",
           "updated", "commit", "between")  # fmt: skip
_TIMEOUT_S = 600


def draw_plan(
    generator: random.Random, kind: str, ranks: int, faults: int, *,
    actions: Sequence[str] = _ACTIONS, moves: bool = False,
) -> list[str]:  # fmt: skip
    """Return faults at least two steps apart, so that a replica is always left.

    In neighbouring steps it need not be: a rank that has committed the first of them is in the
    second while another is still about to die in the first.

    Args:
        generator: Draws.
        kind: Of job.
        ranks: How many.
        faults: How many.
        actions: What to draw from.
        moves: Another rank is asked to move in the step before each fault of a worker.
    """
    committed = STEPS // 3 if kind == "accumulate" else STEPS
    apart = 2 if moves else 1
    drawn = sorted(generator.sample(range(1, committed - apart * faults), faults))
    found: list[str] = []
    for step in (each + apart * place for place, each in enumerate(drawn)):
        if kind == "evaluation" and step % EVALUATE_EVERY == EVALUATE_EVERY - 1:
            continue  # an evaluation commits too, and has neither gradients nor an update
        action = generator.choice(actions)
        entry = f"{action} step={step}"
        if action not in ("reset", "kill_spare"):
            rank = generator.randrange(ranks)
            entry += f" rank={rank}"
            if moves and action != "migrate":
                other = (rank + generator.randrange(1, ranks)) % ranks
                found.append(f"migrate step={step - 1} rank={other}")
        if action in ("kill", "raise", "exit", "stop"):
            entry += f" point={generator.choice(_POINTS)}"
        found.append(entry)
    return found


def run_job(kind: str, ranks: int, plan: list[str], spares: int = 1) -> dict[str, Any]:
    """Run one job; return its exit code, results by rank, fired faults and incidents."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begun_s = time.monotonic()
        done = subprocess.run(
            [*LAUNCHER, "--nproc-per-node", str(ranks), "--spares", str(spares),
             "--job-id", f"soak-{time.monotonic_ns()}",
             "--chaos", "; ".join(plan), str(HERE / "train.py")],
            env=environment(KIND=kind, STEPS=STEPS, TRAINONCE_HOME=folder),
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
        fired = _events(folder, "fault_injected")
        found = incidents(folder, "last")
    return {
        "exit_code": done.returncode,
        "results": {rank: [steps, digest] for _, rank, steps, digest in lines},
        "fired": [event["fault"] for event in fired],
        "causes": Counter(incident["cause"] for incident in found),
        "served_by": Counter(incident["served_by"] for incident in found),
        # From the word that a rank stands still until all ranks are consistent.
        "moves_s": [one["recovery_s"] for one in found if one["served_by"] == "migration"],
        "not_injected": [one["detail"] for one in found if not one["chaos"]],
        "steps_lost": sum(incident["steps_lost"] for incident in found),
        "seconds": time.monotonic() - begun_s,
        "log": without_paths(done.stderr)[-3000:],
    }


def _events(home: Path, kind: str) -> list[dict[str, Any]]:
    with sqlite3.connect(home / "ledger.sqlite") as database:
        rows = database.execute("SELECT record FROM events WHERE kind = ?", (kind,))
        return [json.loads(record) for (record,) in rows]


def judge(job: dict[str, Any], plan: list[str], twin: dict[str, Any]) -> list[str]:
    """Return what is wrong with a job; nothing if all is well."""
    wrong: list[str] = []
    if job["exit_code"]:
        wrong.append(f"exit code {job['exit_code']}")
    if job["results"] != twin["results"]:
        wrong.append("another end state than without faults")
    if job["steps_lost"]:
        wrong.append(f"{job['steps_lost']} committed steps lost")
    if job["not_injected"]:
        wrong.append(f"failures that nobody injected: {job['not_injected']}")
    # What the launcher carries out waits for a spare, and the job may be over before.
    meant = Counter(entry.split()[0] for entry in plan if "point=" in entry)
    missing = meant - Counter(job["fired"])
    if missing:
        wrong.append(f"faults that did not fire: {dict(missing)}")
    return wrong


def soak(args: argparse.Namespace, path: Path, jobs: list[dict[str, Any]]) -> int:
    generator = random.Random(args.seed)
    twins: dict[tuple[str, int], dict[str, Any]] = {}
    number = faults = failed = 0
    begun_at = commit()
    while faults < args.faults:
        kind, ranks = generator.choice(KINDS), generator.choice((2, 2, 3))
        plan = draw_plan(
            generator, kind, ranks, args.faults_a_job,
            actions=args.actions.split(",") if args.actions else _ACTIONS, moves=args.moves,
        )  # fmt: skip
        number += 1
        if number > len(jobs):
            if (kind, ranks) not in twins:
                twins[kind, ranks] = run_job(kind, ranks, [])
            found = run_job(kind, ranks, plan, args.spares)
            wrong = judge(found, plan, twins[kind, ranks])
            if not wrong:
                found.pop("log")
            jobs.append({"kind": kind, "ranks": ranks, "plan": plan, "wrong": wrong, **found})
            fired = Counter(fault for job in jobs for fault in job["fired"])
            result = {
                "commit": begun_at, "config": vars(args),
                "faults": sum(fired.values()), "by_kind": fired,
                "jobs_failed": sum(bool(job["wrong"]) for job in jobs), "jobs": jobs,
            }  # fmt: skip
            write_result(path, result)
        job = jobs[number - 1]
        faults += len(job["fired"])
        failed += bool(job["wrong"])
        word = "; ".join(job["wrong"]) or "same bits"
        print(
            f"{faults}/{args.faults} faults, job {number}: {job['kind']}, {job['ranks']} ranks,"
            f" {', '.join(job['fired'])}: {word} ({job['seconds']:.0f} s)",
            flush=True,
        )
    print(f"{faults} faults in {number} jobs, {failed} jobs failed")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--faults-a-job", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--actions", help="draw from these only, as in kill,stop,migrate")
    parser.add_argument("--moves", action="store_true", help="a move in the step before each fault")
    parser.add_argument("--resume", type=Path, help="result of a run with the same seed")
    parser.add_argument("--hardware", default=default_hardware())
    parser.add_argument("--out", type=Path, help="result file; default in results/")
    args = parser.parse_args()
    jobs = json.loads(args.resume.read_text())["jobs"] if args.resume else []
    path = args.resume or args.out or result_path(__file__, args.hardware)
    for key in ("resume", "out"):
        delattr(args, key)
    return soak(args, path, jobs)


if __name__ == "__main__":
    sys.exit(main())
