"""From SIGKILL to the next committed step: trainonce, torchft, torchrun with a checkpoint.

The three take turns in one run, on the same model, two ranks each, and the parent kills rank 1
(trainonce: ranks 0 and 1 in turn) at a random moment of a step. For each kill:

- `next_commit_s`: until a rank has committed a step that was not committed before the kill.
  For torchft that is the survivor alone, with half of the batch missing.
- `all_ranks_s`: until every rank, the replacement included, has committed a step.

Beside them, `bandwidth_bytes_s`: gloo's plain send and receive of as many bytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import (
    LAUNCHER,
    ROOT,
    TORCHRUN,
    Record,
    default_hardware,
    environment,
    incidents,
    read_records,
    read_result,
    result_path,
    run_job,
    stop,
    summary,
    table,
    wait_until,
    write_result,
)

sys.path.insert(0, str(ROOT / "src"))

from trainonce.controller import control_socket
from trainonce.errors import TrainOnceError

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
MODELS = {  # name: (model, how many bytes of state)
    "10 MB": "mlp:256:12:32",
    "200 MB": "mlp:256:12:32:190",
    "1 GB": "mlp:256:12:32:990",
    "2 GB": "mlp:256:12:32:1990",
}
CHECKPOINT_EVERY = 20
_PATIENCE_S = 180.0


def kill_at_random(pid: int, step_s: float, generator: random.Random) -> float:
    """Kill at any moment of a step; return when."""
    time.sleep(generator.uniform(0, step_s))
    now_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return now_s


def step_time(records: list[Record], rank: int) -> float:
    times = [record.at_s for record in records if record.rank == rank][-50:]
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


# ------------------------------------------------------------------------------ trainonce


def spare_is_ready(job: str) -> bool:
    try:
        status = control_socket.request(job, op="status", timeout_s=10.0)
    except TrainOnceError:
        return False
    return any(worker["rank"] is None and worker["parked"] for worker in status["workers"])


def measure_trainonce(model: str, kills: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    job, steps = f"recovery-{os.getpid()}-{time.monotonic_ns()}", folder / "steps"
    process = subprocess.Popen(
        [*LAUNCHER, "--nproc-per-node", "2", "--spares", "1", "--job-id", job,
         str(HERE / "train_trainonce.py")],
        env=environment(MODEL=model, STEPS_FILE=steps, TRAINONCE_HOME=folder),
        stderr=(folder / "stderr").open("w"),
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    try:
        for turn in range(kills):
            wait_until(lambda: spare_is_ready(job), timeout_s=_PATIENCE_S, what="a spare")
            seen = len(read_records(steps))
            wait_until(
                lambda seen=seen: len(read_records(steps)) > seen + 40,
                timeout_s=_PATIENCE_S,
                what="steps",
            )
            found.append(_kill_trainonce(steps, turn % 2, generator))
        time.sleep(0.1)
    finally:
        stop(process)
    for measured, incident in zip(found, incidents(folder, job), strict=True):
        keys = ("pause_s", "recovery_s", "detected_s", "bytes_moved", "waited_for_spare_s")
        measured["ledger"] = {key: incident[key] for key in keys}
    return found


def _kill_trainonce(steps: Path, rank: int, generator: random.Random) -> dict[str, Any]:
    before = read_records(steps)
    victim = [record for record in before if record.rank == rank][-1].pid
    step_s = step_time(before, rank)
    killed_s = kill_at_random(victim, step_s, generator)

    def recovered() -> tuple[float, float] | None:
        after = [record for record in read_records(steps) if record.at_s > killed_s]
        fresh = [record for record in after if record.rank == rank]
        if not fresh:
            return None
        others = [r for r in after if r.rank != rank and r.step >= fresh[0].step]
        if not others:
            return None
        return min(r.at_s for r in [*fresh, *others]), max(fresh[0].at_s, others[0].at_s)

    first_s, all_s = wait_until(recovered, timeout_s=_PATIENCE_S, what="a commit")
    return {
        "rank": rank,
        "step_s": step_s,
        "next_commit_s": first_s - killed_s,
        "all_ranks_s": all_s - killed_s,
    }


# ------------------------------------------------------------------------------ torchft


def measure_torchft(model: str, seed: int, folder: Path) -> dict[str, Any]:
    generator = random.Random(seed)
    steps, port = folder / "steps", generator.randrange(20000, 30000)
    lighthouse = subprocess.Popen(
        [os.environ.get("TORCHFT_LIGHTHOUSE", "torchft_lighthouse"),
         "--bind", f"127.0.0.1:{port}", "--min_replicas", "1"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=(folder / "lighthouse").open("w"),
    )  # fmt: skip

    def start(replica: int) -> subprocess.Popen[bytes]:
        env = environment(
            MODEL=model,
            STEPS_FILE=steps,
            REPLICA=replica,
            LIGHTHOUSE=f"http://127.0.0.1:{port}",
            GLOO_SOCKET_IFNAME="lo",
            TP_SOCKET_IFNAME="lo",
        )
        log = (folder / f"replica{replica}").open("a")
        return subprocess.Popen([sys.executable, str(HERE / "train_torchft.py")], env=env,
                                stdout=log, stderr=log)  # fmt: skip

    replicas = [start(0), start(1)]
    try:
        wait_until(
            lambda: sum(record.rank == 12 for record in read_records(steps)) > 60,
            timeout_s=_PATIENCE_S,
            what="steps of both replicas",
        )
        step_s = step_time(read_records(steps), 12)
        killed_s = kill_at_random(replicas[1].pid, step_s, generator)
        replicas[1].wait()
        replicas[1] = start(1)  # at once, as the best of supervisors would

        def recovered() -> tuple[float, float] | None:
            after = [r for r in read_records(steps) if r.at_s > killed_s]
            both = [r for r in after if r.rank == 12 and r.at_s > killed_s + 2 * step_s]
            # Before both are back, the survivor can end a step that was reduced before the kill.
            alone = [r for r in after if r.rank == 1]
            return ((alone or both)[0].at_s, both[0].at_s) if both else None

        first_s, all_s = wait_until(recovered, timeout_s=_PATIENCE_S, what="full strength")
        alone = sum(
            killed_s < record.at_s < all_s and record.rank == 1 for record in read_records(steps)
        )
    finally:
        for process in (*replicas, lighthouse):
            process.kill()
            process.wait()
    return {
        "step_s": step_s,
        "next_commit_s": first_s - killed_s,
        "all_ranks_s": all_s - killed_s,
        "steps_with_half_of_the_batch": alone,
    }


# ------------------------------------------------------------------------------ torchrun


def measure_torchrun(model: str, seed: int, folder: Path) -> dict[str, Any]:
    generator = random.Random(seed)
    steps = folder / "steps"
    process = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "5", str(HERE / "train_plain.py")],
        env=environment(
            MODEL=model,
            STEPS_FILE=steps,
            CHECKPOINT=folder / "checkpoint",
            CHECKPOINT_EVERY=CHECKPOINT_EVERY,
        ),
        stderr=(folder / "stderr").open("w"),
    )
    target = int(2.5 * CHECKPOINT_EVERY)  # half-way between two checkpoints: the average loss
    try:
        before = wait_until(
            lambda: [r for r in read_records(steps) if r.rank == 1 and r.step >= target],
            timeout_s=_PATIENCE_S,
            what="steps",
        )
        step_s = step_time(read_records(steps), 1)
        killed_s = kill_at_random(before[-1].pid, step_s, generator)
        done = max(r.step for r in read_records(steps))

        def recovered() -> tuple[float, float, float] | None:
            after = [r for r in read_records(steps) if r.at_s > killed_s and r.pid not in old]
            fresh = [[r for r in after if r.rank == k and r.step > done] for k in (0, 1)]
            if not all(fresh):
                return None
            times = [found[0].at_s for found in fresh]
            return after[0].at_s, min(times), max(times)

        old = {r.pid for r in read_records(steps)}
        restarted_s, first_s, all_s = wait_until(recovered, timeout_s=_PATIENCE_S, what="a step")
    finally:
        process.terminate()
        process.wait()
    log = (folder / "stderr").read_text()
    return {
        "step_s": step_s,
        # More than one: a restarted rank read an address of the round before in the store.
        "restarts": log.count("failed (exitcode"),
        "steps_recomputed": done - done // CHECKPOINT_EVERY * CHECKPOINT_EVERY,
        "first_step_again_s": restarted_s - killed_s,
        "next_commit_s": first_s - killed_s,
        "all_ranks_s": all_s - killed_s,
    }


# ------------------------------------------------------------------------------ the run


def measure_bandwidth(num_bytes: int, repeats: int) -> list[float]:
    text = run_job(
        [*TORCHRUN, "--nproc-per-node", "2", str(HERE / "bandwidth.py"), str(num_bytes),
         str(repeats)]
    )  # fmt: skip
    return [num_bytes / seconds for seconds in json.loads(text)]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    model = MODELS[name]
    repeats: dict[str, list[Any]] = {"trainonce": [], "torchft": [], "torchrun": []}
    for repeat in range(args.repeats):
        for system in repeats if args.systems == "all" else args.systems.split(","):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                if system == "trainonce":
                    found = measure_trainonce(model, args.kills, repeat, folder)
                    repeats[system].extend(found)
                elif system == "torchft":
                    repeats[system].append(_or_failure(measure_torchft, model, repeat, folder))
                else:
                    repeats[system].append(_or_failure(measure_torchrun, model, repeat, folder))
                print(name, system, json.dumps(repeats[system][-1]), flush=True)
    state_bytes = max(r["ledger"]["bytes_moved"] for r in repeats["trainonce"])
    bandwidth = measure_bandwidth(state_bytes, 5)
    return {
        "model": model,
        "state_bytes": state_bytes,
        "bandwidth_bytes_s": bandwidth,
        "repeats": repeats,
        "summary": judge(repeats, state_bytes, statistics.median(bandwidth)),
    }


def _or_failure(measured: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Keep a peer that did not come back as a result of its own."""
    try:
        return measured(*args)
    except TimeoutError as error:
        return {"failed": str(error)}


def judge(repeats: dict[str, list[Any]], state_bytes: int, bandwidth: float) -> dict[str, Any]:
    """Compare with the target: 100 ms plus 1.5 times state over bandwidth, 50 times torchft."""
    result: dict[str, Any] = {
        system: {
            key: summary(run[key] for run in runs if key in run)
            for key in ("step_s", "next_commit_s", "all_ranks_s")
        }
        for system, runs in repeats.items()
        if any("step_s" in run for run in runs)
    }
    ours = result["trainonce"]
    target_s = 0.1 + 1.5 * state_bytes / bandwidth
    beyond_share_s = ours["all_ranks_s"]["median"] - ours["step_s"]["median"]
    result["target_s"] = target_s
    result["beyond_the_share_of_the_step_s"] = beyond_share_s
    result["within_target"] = beyond_share_s <= target_s
    for system in ("torchft", "torchrun"):
        if system in result:
            theirs = result[system]
            result[f"{system}_over_trainonce"] = {
                key: theirs[key]["median"] / ours["all_ranks_s"]["median"]
                for key in ("next_commit_s", "all_ranks_s")
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of the three systems")
    parser.add_argument("--kills", type=int, default=4, help="kills in each turn of trainonce")
    parser.add_argument("--sizes", default="10 MB,200 MB,1 GB")
    parser.add_argument("--systems", default="all", help="trainonce,torchft,torchrun")
    parser.add_argument("--hardware", default=default_hardware())
    parser.add_argument("--no-result", action="store_true", help="print, and write no file")
    args = parser.parse_args()
    path = result_path(__file__, args.hardware)
    sizes: dict[str, Any] = read_result(path).get("sizes", {})
    for name in args.sizes.split(","):
        sizes[name] = measure(name, args)
        print(name, json.dumps(sizes[name]["summary"], indent=1), flush=True)
        if not args.no_result:
            config = {**vars(args), "checkpoint_every": CHECKPOINT_EVERY}
            write_result(path, {"config": config, "torchft": torchft_version(), "sizes": sizes})
    print(markdown(sizes))


def torchft_version() -> str:
    try:
        return importlib.metadata.version("torchft-nightly")
    except importlib.metadata.PackageNotFoundError:
        return ""


def markdown(sizes: dict[str, Any]) -> str:
    """Return the table of the README."""
    rows = [["state", "trainonce", "of it the share of the step", "target", "torchft: survivor",
             "torchft: both", "torchrun"]]  # fmt: skip
    for name, found in sizes.items():
        result = found["summary"]

        def cell(system: str, key: str, result: dict[str, Any] = result) -> str:
            return f"{result[system][key]['median']:.2f} s" if system in result else ""

        rows.append(
            [name, cell("trainonce", "all_ranks_s"), cell("trainonce", "step_s"),
             f"{result['target_s']:.2f} s", cell("torchft", "next_commit_s"),
             cell("torchft", "all_ranks_s"), cell("torchrun", "all_ranks_s")]
        )  # fmt: skip
    return table(rows)


if __name__ == "__main__":
    main()
