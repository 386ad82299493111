"""Counts evaluations when several processes ask for the same results at once.

`python benchmarks/evaluations_once/run.py [--processes 4] [--results 5] [--repeats 5] [--out FILE]`

Each process asks for the same results, in the same order, of a function that takes a fixed
amount of work; every evaluation appends a line to a log. Compared are `trainonce.compute`,
`joblib.Memory`, `datasets.map` where Hugging Face datasets is installed, and no cache at all, in
turn within one run. Then one helper of the function is
edited and one process asks again: what a cache gives is compared with the truth.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import trainonce

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import commit

SOURCE = Path(trainonce.__file__).parents[1]

HELPER = """
def offset():
    return {offset}
"""
PROGRAM = """
import os, sys, time
import numpy as np
from helper import offset

mode, store, log = sys.argv[1:4]
count, spin = map(int, sys.argv[4:6])

def work(seed):
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"x\\n")
    os.close(descriptor)
    matrix = np.random.default_rng(seed).standard_normal((150, 150))
    for _ in range(spin):
        matrix = np.tanh(matrix @ matrix / 150)
    return int(np.abs(matrix).sum() * 0) + offset()

if mode == "trainonce":
    import trainonce as once
    ask = lambda seed, node=once.node(work): once.compute(node(seed), store=store, workers=1)
elif mode == "datasets":
    import datasets
    datasets.disable_progress_bars()
    os.makedirs(store, exist_ok=True)
    def ask(seed):
        # The documented way to have results found again: a stored dataset, and `map`.
        data = datasets.load_from_disk(f"{store}-data/{seed}")
        return data.map(lambda row: {"result": work(row["seed"])})[0]["result"]
elif mode == "joblib":
    import joblib
    ask = joblib.Memory(store, verbose=0).cache(work)
else:
    ask = work

sys.stdin.readline()  # all start together
started = time.perf_counter()
results = [ask(seed) for seed in range(count)]
seconds = time.perf_counter() - started
started = time.perf_counter()
again = [ask(seed) for seed in range(count)] if mode != "nothing" else results
print(seconds, (time.perf_counter() - started) / count, results == again, results[0])
"""
MODES = ("trainonce", "joblib", *(["datasets"] if find_spec("datasets") else []), "nothing")


def start(folder: Path, mode: str, store: Path, log: Path, args: argparse.Namespace):
    command = [sys.executable, "main.py", mode, store, log, args.results, args.spin]
    paths = os.pathsep.join([str(SOURCE), str(folder)])
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def crowd(folder: Path, mode: str, num: int, store: Path, args: argparse.Namespace) -> dict:
    """Start `num` processes together; return evaluations, times and what they got."""
    log = store.with_suffix(".log")
    children = [start(folder, mode, store, log, args) for _ in range(num)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    lines = [child.communicate()[0].split() for child in children]
    assert all(child.returncode == 0 for child in children)
    return {
        "evaluations": len(log.read_text().splitlines()) if log.exists() else 0,
        "seconds": max(float(line[0]) for line in lines),
        "hit_s": sorted(float(line[1]) for line in lines)[len(lines) // 2],
        "value": int(lines[0][3]),
    }


def keep_datasets(folder: str, count: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    for seed in range(count):
        datasets.Dataset.from_dict({"seed": [seed]}).save_to_disk(f"{folder}/{seed}")


def repeat(args: argparse.Namespace) -> dict:
    """One repeat of every mode, on fresh stores."""
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.py").write_text(PROGRAM)
        for mode in MODES:
            (folder / "helper.py").write_text(HELPER.format(offset=1))
            store = folder / f"store-{mode}"
            if mode == "datasets":
                keep_datasets(f"{store}-data", args.results)
            found[mode] = crowd(folder, mode, args.processes, store, args)
            (folder / "helper.py").write_text(HELPER.format(offset=1000))
            edited = crowd(folder, mode, 1, store, args)
            found[mode]["value_after_edit"] = edited["value"]
            found[mode]["stale"] = edited["value"] != 1000
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--results", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--spin", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    repeats = [repeat(args) for _ in range(args.repeats)]
    versions = ("joblib", "numpy", *(["datasets"] if "datasets" in MODES else []))
    report = {
        "commit": commit(),
        "config": {k: v for k, v in vars(args).items() if k != "out"},
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {n: version(n) for n in versions}
        | {"python": platform.python_version(), "trainonce": trainonce.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "repeats": repeats,
    }
    for mode in MODES:
        counts = [r[mode]["evaluations"] for r in repeats]
        ratios = [r[mode]["seconds"] / r["nothing"]["seconds"] for r in repeats]
        stale = sum(r[mode]["stale"] for r in repeats)
        print(
            f"{mode:10} evaluations {counts}  time / no cache "
            f"{[round(ratio, 2) for ratio in ratios]}  stale after edit {stale}/{len(repeats)}"
        )
    hits = [r["trainonce"]["hit_s"] / r["joblib"]["hit_s"] for r in repeats]
    print(f"time of a hit, trainonce / joblib: {[round(hit, 1) for hit in hits]}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
