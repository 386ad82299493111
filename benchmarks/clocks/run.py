"""How well clocks are compared: in network namespaces under load, and in large simulated networks.

    python benchmarks/clocks/run.py [--repeats 3] [--duration 12]

writes `results/<date>_<hardware>_<commit>.json`. The namespaces need root.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from trainonce.fleet.clocks.network import solve_potentials
from trainonce.fleet.clocks.sync import synchronise
from trainonce.testing.clock_lab import (
    ClockLab,
    WrongClock,
    ntp_errors_s,
    start_ns,
    sync_errors_s,
    with_wrong_clocks,
)
from trainonce.testing.namespaces import NetworkLab, why_not

HERE = Path(__file__).parent
LOADS = (0.0, 0.4, 0.75)


def one_run(load: float, seed: int, duration_s: float, *options: str) -> dict[str, Any]:
    with NetworkLab() as lab, tempfile.TemporaryDirectory() as folder:
        hosts = ClockLab(lab)
        if load:
            hosts.load(load)
        records = hosts.probe(Path(folder), "--duration-s", str(duration_s), *options)
    rng = np.random.default_rng(seed)
    clocks = [
        WrongClock(float(rng.uniform(-5e-3, 5e-3)), float(rng.uniform(-2e-5, 2e-5)))
        for _ in hosts.hosts
    ]
    begin = time.perf_counter()
    report = synchronise(with_wrong_clocks(records, clocks))
    solve_s = time.perf_counter() - begin
    errors = sync_errors_s(report, dict(zip(hosts.hosts, clocks, strict=True)), start_ns(records))
    ours = np.abs(np.concatenate(list(errors.values())))
    ntp = np.abs(ntp_errors_s(records, clocks))
    within = [np.abs(each).max() <= report.clocks[host].bound_s for host, each in errors.items()]
    return {
        "load": load,
        "stamps": report.stamps,
        "windows": report.num_windows,
        "ours_us": [round(float(q) * 1e6, 4) for q in np.quantile(ours, [0.5, 0.99, 1])],
        "ntp_us": [round(float(q) * 1e6, 4) for q in np.quantile(ntp, [0.5, 0.99, 1])],
        "ratio_p99": float(np.quantile(ntp, 0.99) / np.quantile(ours, 0.99)),
        "hosts_within_bound": sum(map(bool, within)),
        "hosts": len(within),
        "bound_us": max(clock.bound_s for clock in report.clocks.values()) * 1e6,
        "solve_s": solve_s,
    }


def network_effect(num_hosts: int, neighbours: int, uneven_share: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    chosen = {
        (min(i, int(j)), max(i, int(j)))
        for i in range(num_hosts)
        for j in rng.choice(num_hosts, neighbours, replace=False)
        if i != j
    }
    edges = np.array(sorted(chosen))
    true = rng.normal(0, 1e-3, num_hosts)
    noise = rng.normal(0, 30e-9, len(edges))
    uneven = rng.random(len(edges)) < uneven_share
    noise += np.where(uneven, rng.choice([-1, 1], len(edges)) * rng.uniform(1e-6, 1e-5), 0)
    begin = time.perf_counter()
    solved = solve_potentials(edges, true[edges[:, 1]] - true[edges[:, 0]] + noise, num_hosts)
    solve_s = time.perf_counter() - begin
    named = np.abs(solved.residuals) > 6 * solved.sigma
    return {
        "hosts": num_hosts,
        "edges": len(edges),
        "uneven": int(uneven.sum()),
        "edge_rms_ns": float(np.sqrt((noise**2).mean()) * 1e9),
        "host_rms_ns": float(np.std(solved.values - true) * 1e9),
        "uneven_named": int((named & uneven).sum()),
        "even_named": int((named & ~uneven).sum()),
        "solve_s": solve_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--first-seed", type=int, default=0,
        help="above 0: add the runs to the results of the same day and commit",
    )  # fmt: skip
    parser.add_argument("--duration", type=float, default=12.0)
    args = parser.parse_args()
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=HERE, capture_output=True, text=True).stdout.strip()
    name = f"{datetime.now(UTC):%Y-%m-%d}_{os.cpu_count()}-core-cpu_{commit}"
    effect = [
        network_effect(n, 10, share, seed=0) for n in (64, 256, 1024) for share in (0.0, 0.05)
    ]
    runs: list[dict[str, Any]] = []
    reason = why_not()
    for load in () if reason else LOADS:
        for options in ((), ("--user-stamps",)):
            for seed in range(args.first_seed, args.first_seed + args.repeats):
                runs.append(one_run(load, seed, args.duration, *options))
                print(json.dumps(runs[-1]), flush=True)
    record = {
        "configuration": {
            "hosts": 4, "link_mbit": 100, "offsets_ms": 5, "skews_ppm": 20,
            "duration_s": args.duration, "pairs_per_s": 100, "baseline": "minimum of 8 samples",
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     "scipy": scipy.__version__, "kernel": platform.release()},
        "namespaces": {"skipped": reason} if reason else runs,
        "network_effect": effect,
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"{name}.json"
    if args.first_seed and path.exists():
        runs[:0] = json.loads(path.read_text())["namespaces"]
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
