"""How soon a slow rank is named, against the score of NVIDIA's resiliency extension.

    python benchmarks/stragglers/run.py [--seeds 20]

writes `results/<date>_<hardware>_<commit>.json`. Steps are simulated: 256 ranks, 1 % noise, ranks
0.5 % apart, two hiccups in a thousand steps; from step 500 of 1,000 on one rank is slower.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trainonce.fleet.stragglers import StragglerDetector

HERE = Path(__file__).parent
RANKS, STEPS, BEGIN, SLOW_RANK = 256, 1000, 500, 7
SLOWER = (0.0, 0.03, 0.05, 0.1, 0.2, 0.4)


def steps(seed: int, slower: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    busy = 0.2 * (1 + 0.01 * rng.standard_normal((STEPS, RANKS)))
    busy *= 1 + 0.005 * rng.standard_normal(RANKS)
    hiccup = rng.random((STEPS, RANKS)) < 0.002
    busy[hiccup] *= rng.uniform(1.2, 3, hiccup.sum())
    busy[BEGIN:, SLOW_RANK] *= 1 + slower
    return busy


def ours(busy: np.ndarray) -> Iterator[tuple[int, int]]:
    detector = StragglerDetector(RANKS)
    for step, row in enumerate(busy):
        for straggler in detector.observe(step, row.tolist()):
            yield step, straggler.rank


def relative_score(busy: np.ndarray) -> Iterator[tuple[int, int]]:
    """The baseline: a rank's median of 50 steps is 1.33 times the fastest's (score below 0.75)."""
    for end in range(50, STEPS + 1, 50):
        usual = np.median(busy[end - 50 : end], axis=0)
        for rank in np.flatnonzero(usual.min() / usual < 0.75):
            yield end - 1, int(rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=HERE, capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, Any]] = []
    for slower in SLOWER:
        for name, method in (("trainonce", ours), ("relative score", relative_score)):
            delays: list[int | None] = []
            false = 0
            for seed in range(args.seeds):
                named = list(method(steps(seed, slower)))
                right = [s for s, rank in named if rank == SLOW_RANK and s >= BEGIN and slower]
                delays.append(min(right) - BEGIN if right else None)
                false += len({r for s, r in named if r != SLOW_RANK or s < BEGIN or not slower})
            known = [delay for delay in delays if delay is not None]
            rows.append(
                {"slower": slower, "method": name, "found": len(known), "of": args.seeds,
                 "median_delay_steps": statistics.median(known) if known else None,
                 "false_ranks": false, "delays": delays}
            )  # fmt: skip
            print({key: value for key, value in rows[-1].items() if key != "delays"}, flush=True)
    record = {
        "configuration": {"ranks": RANKS, "steps": STEPS, "begin": BEGIN, "seeds": args.seeds},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "results": rows,
    }
    name = f"{datetime.now(UTC):%Y-%m-%d}_{os.cpu_count()}-core-cpu_{commit}"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
