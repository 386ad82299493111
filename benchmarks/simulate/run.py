"""What failures cost, by policy, size and rates; and how fast that is simulated.

    python benchmarks/simulate/run.py [--seeds 16]

writes `results/<date>_<hardware>_<commit>.json` and the plots beside it.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import trainonce
from trainonce.simulate import plot, study
from trainonce.simulate.failures import CAUSES, RATES, draw_trace
from trainonce.simulate.job import simulate
from trainonce.simulate.policies import POLICIES
from trainonce.simulate.scenario import Scenario

HERE = Path(__file__).parent
SIZES = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384]
SPARES_FOR = (1024, 2048, 16_384)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def against_simpy(repeats: int) -> dict[str, Any]:
    """Time a year of 16,384 GPUs against the process model that the tests compare with."""
    path = HERE.parents[1] / "tests/unit/simulate/test_against_simpy.py"
    spec = importlib.util.spec_from_file_location("against_simpy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scenario = Scenario(num_gpus=16_384, spares=0, repair_h=1.0, false_alarms_per_node_day=0.0)
    policy = dataclasses.replace(POLICIES["trainonce"], predicts=False)
    ours, simpy = [], []
    for seed in range(repeats):
        begin = time.perf_counter()
        simulate(scenario, policy, seed)
        ours.append(time.perf_counter() - begin)
        trace = draw_trace(
            np.random.default_rng(seed),
            rate_per_s=scenario.rate_per_s,
            duration_s=scenario.duration_s,
            causes=scenario.causes,
        )
        begin = time.perf_counter()
        module.ProcessModel(scenario, policy, trace)
        simpy.append(time.perf_counter() - begin)
    ratios = [slow / fast for slow, fast in zip(simpy, ours, strict=True)]
    return {
        "ours_s": ours,
        "simpy_s": simpy,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }


def years(repeats: int) -> dict[str, list[float]]:
    """Time a year of 16,384 GPUs under every policy, spares and false alarms included."""
    scenario, taken = Scenario(num_gpus=16_384), dict[str, list[float]]()
    for policy in POLICIES.values():
        for seed in range(repeats):
            begin = time.perf_counter()
            simulate(scenario, policy, seed)
            taken.setdefault(policy.name, []).append(time.perf_counter() - begin)
    return taken


def slim(result: study.Result) -> dict[str, Any]:
    """Return the result with its policy by name, the settings being kept once for all."""
    record = result.to_record()
    del record["failures_by_cause"]
    return rounded(record | {"policy": result.policy.name})


def rounded(value: Any) -> Any:
    """Keep six digits of every float: the file stays small, and no table shows more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=16)
    args = parser.parse_args()
    seeds = range(args.seeds)
    policies = list(POLICIES.values())
    name = f"{datetime.now(UTC):%Y-%m-%d}_{os.cpu_count()}-core-cpu_{commit()}"
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    record: dict[str, Any] = {
        "configuration": {
            "seeds": args.seeds,
            "sizes": SIZES,
            "days": 365,
            "policies": [dataclasses.asdict(p) for p in policies],
            "causes": [dataclasses.asdict(c) for c in CAUSES],
            "rates": [dataclasses.asdict(r) for r in RATES.values()],
        },
        "versions": {
            "trainonce": trainonce.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "sweeps": {},
        "spares": {},
    }
    for rates in RATES.values():
        print(f"sweep, rates {rates.name}", flush=True)
        swept = study.sweep(Scenario(num_gpus=2048, rates=rates), policies, SIZES, seeds)
        record["sweeps"][rates.name] = [slim(result) for result in swept]
        if rates.name == "rsc-1":
            plot.plot_sweep(swept, results / f"{name}_sweep.png")
    studies = []
    for num_gpus in SPARES_FOR:
        print(f"spares, {num_gpus} GPUs", flush=True)
        found = study.find_spares(Scenario(num_gpus=num_gpus), POLICIES["trainonce"], seeds)
        studies.append(found)
        record["spares"][str(num_gpus)] = {
            "best_spares": found.best.spares,
            "closed_form_spares": found.closed_form,
            "results": [slim(result) for result in found.results],
        }
    plot.plot_spares(studies, results / f"{name}_spares.png")
    print("speed", flush=True)
    record["speed"] = against_simpy(repeats=8)
    record["year_s"] = years(repeats=8)
    (results / f"{name}.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"{name}: simpy takes {record['speed']['median_ratio']:.1f} times as long")
    for policy, taken_s in record["year_s"].items():
        print(f"a year of 16,384 GPUs under {policy}: {1000 * statistics.median(taken_s):.0f} ms")


if __name__ == "__main__":
    main()
