"""What sharded state costs: without failures, in a shadow, and when a shard is lost.

Pieces, each of some minutes, which add to one result file of the commit:

- `overhead`: the same training in turn as plain FSDP2 under torchrun, with trainonce, and with
  trainonce and a shadow of every step; each against the plain runs before and after it, and these
  with each other, which gives the noise. What the shadow's thread takes is counted apart.
- `hidden`: how much of a shadow's copy the training thread waits for, by size of the state.
- `recovery`: ranks of an HSDP job (rebuilt from the rank with the same shard) and of an FSDP job
  (from the shadow) are killed at random moments; each pause against state bytes over the
  bandwidth of what carries them, measured beside it.
- `torchft`: the same model and mesh as torchft's HSDP: step and CPU time against plain, and a
  killed rank, until a group commits again and until both do.
"""

from __future__ import annotations

import argparse
import contextlib
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
    default_hardware,
    environment,
    incidents,
    read_records,
    read_result,
    result_path,
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
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
BANDWIDTH = HERE.parent / "recovery" / "bandwidth.py"
CASES = {  # name: (model, mesh, steps in the window, shadow)
    "HSDP 2x2": ("gpt:128:4:16", "rep:2,shard:2", 12, None),
    "FSDP 2": ("gpt:128:4:16", "shard:2", 20, 1),
}
HIDDEN = {  # name: model of an FSDP job of two, with enough computation or hardly any
    "gpt": "gpt:128:4:16",
    "mlp 1024": "mlp:1024:2:8",
    "mlp 1024, batch 512": "mlp:1024:2:512",
    "mlp 2048": "mlp:2048:2:8",
    "mlp 2048, batch 512": "mlp:2048:2:512",
}
SHARDS = {
    "small": "mlp:256:2:8",
    "medium": "mlp:1024:2:8",
    "large": "mlp:2048:2:8",
    "very large": "mlp:4096:2:8",
}
KINDS = {"rebuild": ("rep:2,shard:2", 0), "shadow": ("shard:2", 1)}
WARM_UP = 4
_PATIENCE_S = 120.0


def num_ranks(mesh: str) -> int:
    ranks = 1
    for axis in mesh.split(","):
        ranks *= int(axis.split(":")[1])
    return ranks


def median(values: Any) -> float:
    return statistics.median(list(values))


# ------------------------------------------------------------------------------ a window of steps


def run_once(mode: str, model: str, mesh: str, steps: int, **extra: Any) -> dict[str, Any]:
    launcher = LAUNCHER if mode == "trainonce" else TORCHRUN
    ranks = num_ranks(mesh)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        subprocess.run(
            [*launcher, "--nproc-per-node", str(ranks), str(HERE / "train.py")],
            env=environment(MODE=mode, MODEL=model, MESH=mesh, STEPS=steps, WARM_UP=WARM_UP,
                            OUT=out, TRAINONCE_HOME=folder, **extra),
            stderr=subprocess.DEVNULL,
            check=True,
        )  # fmt: skip
        found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]
    return {
        "cpu_s": sum(one["cpu_s"] for one in found),
        "median_step_s": median(one["median_step_s"] for one in found),
        "parameters": found[0]["parameters"],
        "shard_bytes": max(one["shard_bytes"] for one in found),
        "digests": [one["digest"] for one in found],
        "log_bytes": max(one["log_bytes"] for one in found),
        "shadow_every": found[0]["shadow_every"],
        "shadow_copying_cpu_s": sum(one["shadow_copying_cpu_s"] for one in found),
        **{
            f"{key}_a_step": max(one[key] for one in found) / steps
            for key in ("shadow_copying_s", "shadow_waiting_s")
        },
        **{
            key: median(one[key] for one in found)
            for key in ("barrier_s", "image_s", "image_bytes")
            if key in found[0]
        },
    }


def measure_overhead(name: str, repeats: int) -> dict[str, Any]:
    model, mesh, steps, shadow = CASES[name]
    kinds = {"trainonce": {"SHADOW": 0}} | ({"shadow": {"SHADOW": shadow}} if shadow else {})
    plain = [run_once("plain", model, mesh, steps)]
    ours: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    ratios: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, extra in kinds.items():
            ours[kind].append(run_once("trainonce", model, mesh, steps, **extra))
            plain.append(run_once("plain", model, mesh, steps))
            ratios[kind].append(_ratios(plain[-2:], ours[kind][-1]))
            print(name, kind, ratios[kind][-1], flush=True)
    runs = [*plain, *(run for each in ours.values() for run in each)]
    return {
        "model": model, "mesh": mesh, "steps": steps,
        "parameters": plain[0]["parameters"], "shard_bytes": plain[0]["shard_bytes"],
        "plain": plain, "trainonce": ours,
        "ratios": {
            kind: {key: summary(one[key] for one in found) for key in found[0]}
            for kind, found in ratios.items()
        },
        "log_bytes": {kind: max(run["log_bytes"] for run in each) for kind, each in ours.items()},
        "same_bits": len({tuple(run["digests"]) for run in runs}) == 1,
    }  # fmt: skip


def _ratios(around: list[dict[str, Any]], ours: dict[str, Any]) -> dict[str, float]:
    before, after = around
    plain_s = (before["cpu_s"] + after["cpu_s"]) / 2
    return {
        "cpu": (ours["cpu_s"] - ours["shadow_copying_cpu_s"]) / plain_s,
        "shadow_cpu": ours["shadow_copying_cpu_s"] / plain_s,
        "step": 2 * ours["median_step_s"] / (before["median_step_s"] + after["median_step_s"]),
        "cpu_noise": after["cpu_s"] / before["cpu_s"],
        "step_noise": after["median_step_s"] / before["median_step_s"],
    }


def measure_hidden(model: str, repeats: int) -> dict[str, Any]:
    """Compare steps with and without a shadow, in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    for _ in range(repeats):
        for kind, every in (("without", 0), ("with", 1)):
            runs[kind].append(run_once("trainonce", model, "shard:2", 20, SHADOW=every))
    with_it = runs["with"]
    copying_s = median(run["shadow_copying_s_a_step"] for run in with_it)
    waiting_s = median(run["shadow_waiting_s_a_step"] for run in with_it)
    return {
        "model": model,
        "bytes_a_step": with_it[0]["image_bytes"],
        "step_s": {kind: median(run["median_step_s"] for run in each)
                   for kind, each in runs.items()},
        "copying_s": copying_s,
        "waited_for_s": waiting_s,
        "hidden": 1.0 - min(1.0, waiting_s / copying_s),
        "runs": runs,
    }  # fmt: skip


# ------------------------------------------------------------------------------ recovery


def is_ready(job: str, *, spares: int) -> bool:
    """Tell whether so many spares are parked."""
    try:
        status = control_socket.request(job, op="status", timeout_s=10.0)
    except TrainOnceError:
        return False
    return sum(bool(worker["parked"]) for worker in status["workers"]) >= spares


def measure_recovery(kind: str, model: str, kills: int, seed: int) -> dict[str, Any]:
    mesh, shadow = KINDS[kind]
    generator, ranks = random.Random(seed), num_ranks(mesh)
    job = f"sharded-{os.getpid()}-{time.monotonic_ns()}"
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps"
        process = subprocess.Popen(
            [*LAUNCHER, "--nproc-per-node", str(ranks), "--spares", "1", "--job-id", job,
             str(HERE / "train.py")],
            env=environment(MODE="trainonce", MODEL=model, MESH=mesh, SHADOW=shadow, STEPS=0,
                            WARM_UP=0, OUT=folder, STEPS_FILE=steps, TRAINONCE_HOME=folder),
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            for turn in range(kills):
                wait_until(lambda: is_ready(job, spares=1), timeout_s=_PATIENCE_S, what="a spare")
                _wait_for_steps(steps, ranks, 5)
                _kill(steps, turn % ranks, generator)
                _wait_for_steps(steps, ranks, 2)
        finally:
            stop(process)
        found = incidents(Path(folder), job)
    keys = ("served_by", "pause_s", "recovery_s", "detected_s", "bytes_moved", "steps_lost",
            "waited_for_spare_s", "micro_batches_recomputed", "digest_before",
            "digest_after")  # fmt: skip
    return {
        "model": model,
        "mesh": mesh,
        "incidents": [{key: one[key] for key in keys} for one in found if one["ranks"]],
    }


def _wait_for_steps(path: Path, ranks: int, count: int) -> None:
    """Wait until every rank has made `count` more steps."""
    seen = len(read_records(path))

    def made() -> bool:
        fresh = read_records(path)[seen:]
        return all(sum(one.rank == rank for one in fresh) >= count for rank in range(ranks))

    wait_until(made, timeout_s=_PATIENCE_S, what="steps")


def _kill(path: Path, rank: int, generator: random.Random) -> None:
    times = [(one.at_s, one.pid) for one in read_records(path) if one.rank == rank][-20:]
    gaps = [b - a for (a, _), (b, _) in zip(times, times[1:], strict=False)]
    time.sleep(generator.uniform(0, statistics.median(gaps)))
    os.kill(times[-1][1], signal.SIGKILL)


def measure_bandwidth(kind: str, num_bytes: int) -> list[float]:
    """Return bytes a second of gloo's own send, or of copying and checking memory."""
    if kind == "rebuild":
        text = subprocess.check_output(
            [*TORCHRUN, "--nproc-per-node", "2", str(BANDWIDTH), str(num_bytes), "5"],
            env=environment(), stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        return [num_bytes / seconds for seconds in json.loads(text)]
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    took: list[float] = []
    for _ in range(6):
        begun_s = time.perf_counter()
        target.copy_(source)
        took.append(time.perf_counter() - begun_s)
    return [num_bytes / seconds for seconds in took[1:]]


def judge_recovery(kind: str, measured: dict[str, Any]) -> dict[str, Any]:
    served = measured["incidents"]
    size = max(one["bytes_moved"] for one in served)
    bandwidth = measure_bandwidth(kind, size)
    return {
        **measured,
        "state_bytes": size,
        "bandwidth_bytes_s": bandwidth,
        "limit_s": size / median(bandwidth),
        "pause_s": summary(one["pause_s"] for one in served),
        "recovery_s": summary(one["recovery_s"] for one in served),
        "waited_for_spare_s": summary(one["waited_for_spare_s"] for one in served),
        "same_digest": all(one["digest_before"] == one["digest_after"] for one in served),
    }


# ------------------------------------------------------------------------------ torchft


@contextlib.contextmanager
def torchft_groups(
    model: str, folder: Path, **extra: Any
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a lighthouse and one torchrun a replica group of two ranks."""
    port = random.Random(time.monotonic_ns()).randrange(20000, 30000)
    lighthouse = subprocess.Popen(
        [os.environ.get("TORCHFT_LIGHTHOUSE", "torchft_lighthouse"),
         "--bind", f"127.0.0.1:{port}", "--min_replicas", "1"],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    groups = [
        subprocess.Popen(
            [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "5",
             str(HERE / "train_torchft.py")],
            env=environment(MODEL=model, REPLICA=replica, LIGHTHOUSE=f"http://127.0.0.1:{port}",
                            GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo", WARM_UP=WARM_UP,
                            OUT=folder / "out", **extra),
            stdout=subprocess.DEVNULL, stderr=(folder / f"group{replica}").open("w"),
        )
        for replica in (0, 1)
    ]  # fmt: skip
    try:
        yield groups
    finally:
        for process in groups:
            process.terminate()
        for process in groups:
            process.wait()
        lighthouse.kill()
        lighthouse.wait()


def run_torchft(model: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, torchft_groups(
        model, Path(folder), STEPS=steps
    ) as groups:  # fmt: skip
        for process in groups:
            process.wait(_PATIENCE_S)
        found = [json.loads((Path(folder) / f"out.{rank}").read_text()) for rank in range(4)]
    return {
        "cpu_s": sum(one["cpu_s"] for one in found),
        "median_step_s": median(one["median_step_s"] for one in found),
        "steps_alone": max(one["steps_alone"] for one in found),
    }


def kill_torchft(model: str, seed: int) -> dict[str, Any]:
    """Kill a rank of the second group; torchrun starts that group again at once."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        steps = folder / "steps"
        with torchft_groups(model, folder, STEPS=0, STEPS_FILE=steps):
            wait_until(
                lambda: sum(record.rank == 12 for record in read_records(steps)) > 20,
                timeout_s=_PATIENCE_S,
                what="steps of both groups",
            )
            times = [r.at_s for r in read_records(steps) if r.rank == 12][-20:]
            step_s = median(b - a for a, b in zip(times, times[1:], strict=False))
            victim = next(r.pid for r in reversed(read_records(steps)) if r.rank == 12)
            time.sleep(generator.uniform(0, step_s))
            killed_s = time.monotonic()
            os.kill(victim, signal.SIGKILL)

            def recovered() -> tuple[float, float] | None:
                after = [r for r in read_records(steps) if r.at_s > killed_s]
                both = [r for r in after if r.rank == 12 and r.pid != victim]
                alone = [r for r in after if r.rank == 1]
                return ((alone or both)[0].at_s, both[0].at_s) if both else None

            first_s, all_s = wait_until(recovered, timeout_s=2 * _PATIENCE_S, what="both groups")
            alone = sum(killed_s < r.at_s < all_s and r.rank == 1 for r in read_records(steps))
    return {
        "step_s": step_s,
        "next_commit_s": first_s - killed_s,
        "all_ranks_s": all_s - killed_s,
        "steps_with_half_of_the_batch": alone,
    }


def measure_torchft(repeats: int) -> dict[str, Any]:
    model, mesh, steps, _ = CASES["HSDP 2x2"]
    plain = [run_once("plain", model, mesh, steps)]
    theirs: list[dict[str, Any]] = []
    ratios: list[dict[str, float]] = []
    kills: list[dict[str, Any]] = []
    for repeat in range(repeats):
        try:
            theirs.append(run_torchft(model, steps))
            plain.append(run_once("plain", model, mesh, steps))
            before, after = plain[-2:]
            ratios.append({
                key: 2 * theirs[-1][name] / (before[name] + after[name])
                for key, name in (("cpu", "cpu_s"), ("step", "median_step_s"))
            })  # fmt: skip
            print("torchft", ratios[-1], flush=True)
            kills.append(kill_torchft(model, repeat))
        except (TimeoutError, subprocess.TimeoutExpired, FileNotFoundError) as error:
            kills.append({"failed": str(error)})  # a peer that did not come back is a result
        print("torchft", kills[-1], flush=True)
    return {
        "version": _torchft_version(), "model": model, "mesh": mesh, "steps": steps,
        "plain": plain, "runs": theirs, "kills": kills,
        "ratios": {key: summary(one[key] for one in ratios) for key in ("cpu", "step")}
        if ratios else {},
    }  # fmt: skip


def _torchft_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("torchft-nightly")
    except importlib.metadata.PackageNotFoundError:
        return ""


# ------------------------------------------------------------------------------ the tables


def markdown(found: dict[str, Any]) -> str:
    """Return the tables of the README for what there is."""
    parts: list[str] = []
    if found.get("overhead"):
        rows = [["mesh", "kind", "CPU without copies", "copies", "step", "plain: CPU",
                 "plain: step", "log", "same bits"]]  # fmt: skip
        for name, one in found["overhead"].items():
            for kind, ratios in one["ratios"].items():
                keys = ("cpu", "shadow_cpu", "step", "cpu_noise", "step_noise")
                rows.append([
                    name, kind, *(_cell(ratios[key]) for key in keys),
                    f"{one['log_bytes'][kind] / 1e6:.1f} MB",
                    "yes" if one["same_bits"] else "NO",
                ])  # fmt: skip
        parts.append(table(rows))
    if found.get("hidden"):
        rows = [["model", "copied a step", "step without", "step with", "copy", "waited for",
                 "hidden"]]  # fmt: skip
        rows += [
            [one["model"], f"{one['bytes_a_step'] / 1e6:.1f} MB", _ms(one["step_s"]["without"]),
             _ms(one["step_s"]["with"]), _ms(one["copying_s"]), _ms(one["waited_for_s"]),
             f"{one['hidden']:.0%}"]
            for one in found["hidden"].values()
        ]  # fmt: skip
        parts.append(table(rows))
    if found.get("recovery"):
        rows = [["from", "state moved", "kills", "pause", "of it recovery", "waiting for a spare",
                 "bytes over bandwidth", "same digests"]]  # fmt: skip
        rows += [
            [name.split(", ")[0], f"{one['state_bytes'] / 1e6:.1f} MB",
             str(len(one["incidents"])), _seconds(one["pause_s"]), _seconds(one["recovery_s"]),
             _seconds(one["waited_for_spare_s"]), f"{1e3 * one['limit_s']:.1f} ms",
             "yes" if one["same_digest"] else "NO"]
            for name, one in found["recovery"].items()
        ]  # fmt: skip
        parts.append(table(rows))
    if found.get("torchft"):
        one = found["torchft"]
        back = [kill for kill in one["kills"] if "step_s" in kill]
        rows = [["torchft HSDP 2x2", "against plain FSDP2"]]
        rows += [[key, _cell(one["ratios"][key])] for key in one["ratios"]]
        parts.append(table(rows))
        rows = [["kill", "one group commits", "both do", "steps with half of the batch"]]
        rows += [
            [str(number), f"{kill['next_commit_s']:.1f} s", f"{kill['all_ranks_s']:.1f} s",
             str(kill["steps_with_half_of_the_batch"])]
            for number, kill in enumerate(back, 1)
        ]  # fmt: skip
        parts.append(table(rows))
    return "\n\n".join(parts)


def _cell(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"


def _seconds(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} s ({found['min']:.2f} to {found['max']:.2f})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=4, help="for each size and kind")
    parser.add_argument("--pieces", default="overhead,hidden,recovery,torchft")
    parser.add_argument("--only", default="", help="part of a name within the pieces; default all")
    parser.add_argument("--hardware", default=default_hardware())
    parser.add_argument("--no-result", action="store_true", help="print, and write no file")
    args = parser.parse_args()
    path = result_path(__file__, args.hardware)
    found = read_result(path)
    found.setdefault("load_average", {})

    def keep(piece: str, name: str, value: dict[str, Any]) -> None:
        if name:
            found.setdefault(piece, {})[name] = value
        else:
            found[piece] = value
        found["load_average"][f"{piece} {name}".strip()] = os.getloadavg()[0]
        if not args.no_result:
            found["config"] = {**found.get("config", {}), piece: vars(args)}
            write_result(path, {k: v for k, v in found.items() if k not in ("machine", "commit")})

    pieces = args.pieces.split(",")
    for name in filter(lambda name: args.only in name, CASES if "overhead" in pieces else ()):
        keep("overhead", name, measure_overhead(name, args.repeats))
    for name in filter(lambda name: args.only in name, HIDDEN if "hidden" in pieces else ()):
        keep("hidden", name, measure_hidden(HIDDEN[name], args.repeats))
    for kind in KINDS if "recovery" in pieces else ():
        for size, model in SHARDS.items():
            if args.only in (name := f"{kind}, {size}"):
                measured = measure_recovery(kind, model, args.kills, seed=len(size))
                keep("recovery", name, judge_recovery(kind, measured))
                print(name, found["recovery"][name]["pause_s"], flush=True)
    if "torchft" in pieces:
        keep("torchft", "", measure_torchft(args.repeats))
    print(markdown(found))


if __name__ == "__main__":
    main()
