"""What sharded state costs: without failures, in a shadow, and when a shard is lost.

Overhead: the same training in turn as plain FSDP2 under torchrun, with trainonce, and with
trainonce and a shadow of every step; each against the plain runs before and after it, and these
with each other, which gives the noise. Recovery: a rank of an HSDP job kills itself in the middle
of a backward pass; the incident says how many bytes were moved and how long it took, counted
from the promotion of a waiting spare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import (
    LAUNCHER,
    TORCHRUN,
    default_hardware,
    environment,
    incidents,
    result_path,
    summary,
    table,
    write_result,
)

HERE = Path(__file__).resolve().parent
CASES = {  # name: (model, mesh, steps in the window, shadow)
    "HSDP 2x2": ("gpt:128:4:16", "rep:2,shard:2", 12, None),
    "FSDP 2": ("gpt:128:4:16", "shard:2", 20, 1),
}
SHARDS = {"0.5 MB": "mlp:256:2:8", "8 MB": "mlp:1024:2:8", "34 MB": "mlp:2048:2:8"}


def launch(mode: str, model: str, mesh: str, steps: int, home: Path, *options: str, **extra: Any):
    ranks = 1
    for axis in mesh.split(","):
        ranks *= int(axis.split(":")[1])
    launcher = LAUNCHER if mode == "trainonce" else TORCHRUN
    out = home / "out"
    subprocess.run(
        [*launcher, "--nproc-per-node", str(ranks), *options, str(HERE / "train.py")],
        env=environment(
            MODE=mode, MODEL=model, MESH=mesh, STEPS=steps, WARM_UP=4, OUT=out,
            TRAINONCE_HOME=home, **extra,
        ),
        stderr=subprocess.DEVNULL,
        check=True,
    )  # fmt: skip
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]


def run_once(mode: str, model: str, mesh: str, steps: int, **extra: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = launch(mode, model, mesh, steps, Path(folder), **extra)
    return {
        "cpu_s": sum(one["cpu_s"] for one in found),
        "median_step_s": statistics.median(one["median_step_s"] for one in found),
        "parameters": found[0]["parameters"],
        "shard_bytes": max(one["shard_bytes"] for one in found),
        "digests": [one["digest"] for one in found],
        "log_bytes": max(one["log_bytes"] for one in found),
        "shadow_every": found[0]["shadow_every"],
        **{
            key: statistics.median(one[key] for one in found)
            for key in ("barrier_s", "image_s", "image_bytes")
            if key in found[0]
        },
    }


def measure(name: str, repeats: int) -> dict[str, Any]:
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
        "name": name, "model": model, "mesh": mesh, "steps": steps,
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
    return {
        "cpu": 2 * ours["cpu_s"] / (before["cpu_s"] + after["cpu_s"]),
        "step": 2 * ours["median_step_s"] / (before["median_step_s"] + after["median_step_s"]),
        "cpu_noise": after["cpu_s"] / before["cpu_s"],
    }


def recover(name: str, model: str) -> dict[str, Any]:
    """Lose one of four ranks with a shard of about the size `name`; return its incident."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        found = launch(
            "trainonce", model, "rep:2,shard:2", 20, home,
            "--spares", "1", "--job-id", "bench", "--chaos", "kill rank=1 step=16 point=backward",
        )  # fmt: skip
        (incident,) = incidents(home, "bench")
    keys = ("served_by", "pause_s", "recovery_s", "bytes_moved", "steps_lost",
            "waited_for_spare_s", "digest_before", "digest_after")  # fmt: skip
    return {
        "name": name, "model": model, "shard_bytes": found[0]["shard_bytes"],
        **{key: incident[key] for key in keys},
    }  # fmt: skip


def markdown(overhead: list[dict[str, Any]], recovery: list[dict[str, Any]]) -> str:
    rows = [["mesh", "kind", "CPU against plain", "plain against plain", "step against plain",
             "log", "same bits"]]  # fmt: skip
    for one in overhead:
        for kind, ratios in one["ratios"].items():
            rows.append([
                one["name"], kind, *(_cell(ratios[key]) for key in ("cpu", "cpu_noise", "step")),
                f"{one['log_bytes'][kind] / 1e6:.1f} MB", "yes" if one["same_bits"] else "NO",
            ])  # fmt: skip
    lost = [["state moved", "recovery", "of it waiting for a spare", "pause"]]
    lost += [
        [f"{one['bytes_moved'] / 1e6:.1f} MB", f"{one['recovery_s']:.2f} s",
         f"{one['waited_for_spare_s']:.2f} s", f"{one['pause_s']:.2f} s"]
        for one in recovery
    ]  # fmt: skip
    return f"{table(rows)}\n\n{table(lost)}"


def _cell(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", default="", help="part of the name; default all")
    parser.add_argument("--shards", default="", help="part of the size; default all")
    parser.add_argument("--hardware", default=default_hardware())
    parser.add_argument("--no-result", action="store_true", help="print, and write no file")
    args = parser.parse_args()
    path = result_path(__file__, args.hardware)
    overhead: list[dict[str, Any]] = []
    recovery: list[dict[str, Any]] = []

    def keep() -> None:
        if not args.no_result:
            record = {"config": vars(args), "overhead": overhead, "recovery": recovery}
            write_result(path, record)

    for name, model in SHARDS.items():
        if args.shards in name:
            recovery.append(recover(name, model))
            keep()
    for name in CASES:
        if args.cases in name:
            overhead.append(measure(name, args.repeats))
            keep()
    print(markdown(overhead, recovery))


if __name__ == "__main__":
    main()
