"""What exactly-once steps cost while nothing fails, against plain DDP under torchrun.

For each model the same training runs in turn as plain, trainonce, plain, trainonce …; each
trainonce run is compared with the mean of the plain runs before and after it, and these two
with each other, which gives the noise. CPU seconds are those of all ranks in a window of steps
after a warm-up; the launcher's own are kept apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import (
    LAUNCHER,
    TORCHRUN,
    default_hardware,
    read_result,
    result_path,
    run_job,
    summary,
    table,
    write_result,
)

HERE = Path(__file__).resolve().parent
# name: (model, steps of the window, and of the warm-up before it). The warm-up outlasts what
# `trainonce run` does once beside the first steps: its template process imports torch, a spare
# starts and rehearses.
MODELS = {
    "mlp 8 thousand": ("mlp:64:2:32", 4000, 8000),
    "mlp 0.8 million": ("mlp:256:12:128", 600, 800),
    "gpt 0.9 million, 1024 tokens": ("gpt:128:4:16", 100, 140),
    "gpt 0.9 million, 8192 tokens": ("gpt:128:4:128", 12, 18),
    "gpt 3.3 million, 2048 tokens": ("gpt:256:4:32", 16, 24),
}


def run_once(mode: str, model: str, ranks: int) -> dict[str, Any]:
    workload, steps, warm_up = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        launcher = LAUNCHER if mode == "trainonce" else TORCHRUN
        run_job(
            [*launcher, "--nproc-per-node", str(ranks), str(HERE / "train.py")],
            MODE=mode,
            MODEL=workload,
            STEPS=steps,
            WARM_UP=warm_up,
            OUT=out,
            TRAINONCE_HOME=folder,
        )
        found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]
    return {
        "cpu_s": sum(one["cpu_s"] for one in found),
        "wall_s": max(one["wall_s"] for one in found),
        "median_step_s": statistics.median(one["median_step_s"] for one in found),
        "launcher_cpu_s": found[0]["launcher_cpu_s"],
        "parameters": found[0]["parameters"],
        "digests": sorted({one["digest"] for one in found}),
        "log_bytes": max(one["log_bytes"] for one in found),
    }


def measure(model: str, ranks: int, repeats: int) -> dict[str, Any]:
    plain = [run_once("plain", model, ranks)]
    ours: list[dict[str, Any]] = []
    for _ in range(repeats):
        ours.append(run_once("trainonce", model, ranks))
        plain.append(run_once("plain", model, ranks))
        print(model, ranks, _ratios(plain[-2:], ours[-1]), flush=True)
    ratios = [_ratios(plain[i : i + 2], one) for i, one in enumerate(ours)]
    cpu_s = statistics.median(run["cpu_s"] for run in plain)
    workload, steps, warm_up = MODELS[model]
    return {
        "name": model,
        "model": workload,
        "ranks": ranks,
        "steps": steps,
        "warm_up": warm_up,
        "parameters": ours[0]["parameters"],
        "plain": plain,
        "trainonce": ours,
        "ratios": {key: summary(one[key] for one in ratios) for key in ratios[0]},
        "cpu_ms_a_step_and_rank": {
            "plain": 1e3 * cpu_s / steps / ranks,
            "trainonce": 1e3 * statistics.median(r["cpu_s"] for r in ours) / steps / ranks,
        },
        "digests_equal": len({d for run in (*plain, *ours) for d in run["digests"]}) == 1,
        "log_bytes": max(run["log_bytes"] for run in ours),
    }


def _ratios(around: list[dict[str, Any]], ours: dict[str, Any]) -> dict[str, float]:
    before, after = around
    return {
        "cpu": 2 * ours["cpu_s"] / (before["cpu_s"] + after["cpu_s"]),
        "step": 2 * ours["median_step_s"] / (before["median_step_s"] + after["median_step_s"]),
        "cpu_noise": after["cpu_s"] / before["cpu_s"],
        "step_noise": after["median_step_s"] / before["median_step_s"],
    }


def markdown(results: list[dict[str, Any]]) -> str:
    rows = [["model", "ranks", "CPU a step, plain", "CPU trainonce / plain",
             "plain / plain", "step time trainonce / plain", "log", "same bits"]]  # fmt: skip
    for one in results:
        ratios = one["ratios"]

        def cell(key: str, ratios: dict[str, Any] = ratios) -> str:
            found = ratios[key]
            return f"{found['median']:.3f} ({found['q1']:.3f} to {found['q3']:.3f})"

        rows.append(
            [one["name"], str(one["ranks"]), f"{one['cpu_ms_a_step_and_rank']['plain']:.2f} ms",
             cell("cpu"), cell("cpu_noise"), cell("step"),
             f"{one['log_bytes'] / 1e6:.2f} MB", "yes" if one["digests_equal"] else "NO"]
        )  # fmt: skip
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", default="2", help="such as 2,4")
    parser.add_argument("--models", default="", help="part of the name; default all")
    parser.add_argument("--hardware", default=default_hardware())
    parser.add_argument("--no-result", action="store_true", help="print, and write no file")
    args = parser.parse_args()
    path = result_path(__file__, args.hardware)
    results: list[dict[str, Any]] = read_result(path).get("results", [])
    names = [name for name in MODELS if args.models in name]
    for ranks in map(int, args.ranks.split(",")):
        for name in names:
            results = [r for r in results if (r["name"], r["ranks"]) != (name, ranks)]
            results.append(measure(name, ranks, args.repeats))
            if not args.no_result:
                write_result(path, {"config": vars(args), "results": results})
    print(markdown(results))


if __name__ == "__main__":
    main()
