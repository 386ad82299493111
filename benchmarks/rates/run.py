"""Measure how good the learning rates are that plans choose; see README.md.

    python benchmarks/rates/run.py [--tasks tuning|seen|reporting] [--seeds 3] [--out FILE]
        [--journal FILE]
    python benchmarks/rates/run.py --show FILE...

For each task and seed a ladder of rates is trained to the full length. The rate of a plan, and
those of the two rules before it, are trained to the same length, from the same weights and batches.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
from pathlib import Path

import torch

import trainonce
from trainonce.levers.batches import as_data
from trainonce.levers.probe import expected_rate, rate_probe
from trainonce.levers.probes import Prober

sys.path.insert(0, str(Path(__file__).parents[1]))
import tasks
from harness import commit, machine

LADDER = [1e-3 * 2**k for k in range(9)]
BATCH = 32
LEAST = 1e-4
KINDS = {"tuning": tasks.TUNING, "seen": tasks.SEEN, "reporting": tasks.REPORTING}


def second_rule(prober, muon, steps):
    """The rule after it: of width and length, and half-way to what is a tenth better for short."""
    each, start = min(int(0.2 * steps / 7), 200), expected_rate(prober.model, steps)

    def train(rate):
        return prober.train(rate, muon, each, total_steps=each, seed=0)

    found = rate_probe(train, start, factor=2.5, max_runs=4, least_gain=0.1)
    return float(f"{math.sqrt(start * found.value):.3g}")


def first_rule(prober, muon, steps):
    """The first rule: from 0.004 by runs of 1/40, lowered by the length's -0.32th power."""
    each = min(int(0.2 * steps / 8), 200)

    def train(rate):
        return prober.train(rate, muon, each, total_steps=each, seed=0)

    found = rate_probe(train, 4e-3, factor=2.5, max_runs=5)
    return float(f"{found.value * (each / steps) ** 0.32:.3g}")


def measure(task, seed):
    torch.manual_seed(seed)
    model, data, loss, steps = task(seed)
    plan = trainonce.plan(model, data, loss, steps=steps, seed=seed)
    muon = plan.is_on("optimizer")
    source = as_data(data)
    prober = Prober(
        model, source, None, loss, device=torch.device("cpu"), batch_size=BATCH, seed=seed
    )

    def finish(rate):
        return prober.train(rate, muon, steps, total_steps=steps, seed=1000 + seed)

    rates = {
        "plan": plan.run.lr,
        "first rule": first_rule(prober, muon, steps),
        "second rule": second_rule(prober, muon, steps),
    }
    return {
        "task": task.__name__,
        "seed": seed,
        "steps": steps,
        "optimizer": "muon" if muon else "adamw",
        "ladder": {f"{rate:g}": finite(finish(rate)) for rate in LADDER},
        "chosen": {
            name: {"rate": rate, "loss": finite(finish(rate))} for name, rate in rates.items()
        },
        "tried": plan.probes.tried_lr,
    }


def finite(loss):
    return loss if math.isfinite(loss) else None


def regret(row, name):
    """Return the natural logarithm of the loss over the best of the ladder.

    A loss below LEAST counts as that: a table that is told apart whole has a loss of nothing.
    """
    best = min(loss for loss in row["ladder"].values() if loss is not None)
    loss = row["chosen"][name]["loss"]
    return math.inf if loss is None else math.log(max(loss, LEAST) / max(best, LEAST))


def show(record):
    rows = record["rows"]
    print(
        f"{record['tasks']}, {record['seeds']} seeds, {record['machine']}, "
        f"commit {record['commit']}\n"
    )
    names = list(rows[0]["chosen"])
    print("| task | updates | best of the ladder | " + " | ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        cells = [task + f" ({mine[0]['optimizer']})", str(mine[0]["steps"])]
        best = [
            min((loss, rate) for rate, loss in row["ladder"].items() if loss is not None)
            for row in mine
        ]
        cells.append(", ".join(f"{loss:.3g} at {rate}" for loss, rate in best))
        cells += [
            ", ".join(
                f"{row['chosen'][name]['loss']:.3g} at {row['chosen'][name]['rate']:g}"
                for row in mine
            )
            for name in names
        ]
        print("| " + " | ".join(cells) + " |")
    for name in names:
        found = [regret(row, name) for row in rows]
        print(
            f"\n{name}: loss over that of the best rate, geometric mean "
            f"{math.exp(statistics.fmean(found)):.2f}, worst {math.exp(max(found)):.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", choices=list(KINDS), default="reporting")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--journal", type=Path, help="keep finished rows there, and go on from it")
    parser.add_argument("--show", type=Path, nargs="+")
    args = parser.parse_args()
    if args.show:
        for path in args.show:
            show(json.loads(path.read_text()))
        return
    torch.set_num_threads(1)
    chosen = KINDS[args.tasks]
    lines = args.journal.read_text().splitlines() if args.journal and args.journal.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["task"], row["seed"]) for row in rows}
    for task in chosen:
        for seed in range(args.seeds):
            if (task.__name__, seed) in done:
                continue
            rows.append(measure(task, seed))
            if args.journal:
                with args.journal.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1]["task"], seed, rows[-1]["chosen"], file=sys.stderr, flush=True)
    record = {
        "tasks": args.tasks,
        "seeds": args.seeds,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    show(record)


if __name__ == "__main__":
    main()
