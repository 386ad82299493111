"""Measure what sharing prefixes saves in a sweep; see README.md.

    python benchmarks/sweeps/run.py [--quick] [--out FILE]

Both sides train the same trials on scikit-learn's digits in this process, one thread, and every
final state is compared bit by bit.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import trainonce as once
from trainonce.graph.digest import digest

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import commit, machine

DATA = load_digits()
IMAGES = torch.from_numpy(DATA.images).float()[:, None] / 16
DIGITS = torch.from_numpy(DATA.target)


def build(hyper, images, digits):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(1)
    return {"model": model, "optimizer": optimizer, "order": order, "images": images,
            "digits": digits}  # fmt: skip


def step(objects, hyper, index):
    chosen = torch.randint(0, 1500, (64,), generator=objects["order"])
    logits = objects["model"](objects["images"][chosen])
    nn.functional.cross_entropy(logits, objects["digits"][chosen]).backward()
    objects["optimizer"].param_groups[0]["lr"] = hyper["lr"]
    objects["optimizer"].step()
    objects["optimizer"].zero_grad()


def accuracy(objects):
    model = objects["model"].eval()
    with torch.no_grad():
        found = model(objects["images"][1500:]).argmax(1)
    return (found == objects["digits"][1500:]).double().mean().item()


def late_decays(segment, num_steps, count):
    """A constant trunk; every trial decays at another of its last steps."""
    first, last = int(0.8 * num_steps), num_steps - num_steps // 100
    places = [first + (last - first) * n // (count - 1) for n in range(count)]
    return [segment.trial(num_steps, lr={0: 0.05, at: 0.005}) for at in places]


def cosines(segment, num_steps, count):
    """Cosine schedules with as many peaks: no two share a step."""

    def schedule(peak):
        wave = torch.cos(torch.linspace(0, torch.pi, num_steps)).tolist()
        return [peak * (1 + value) / 2 for value in wave]

    return [segment.trial(num_steps, lr=schedule(0.01 + 0.005 * n)) for n in range(count)]


def measure(segment, trials):
    # Each trial alone, as a loop without a store would train it.
    started = time.process_time()
    alone = [segment.run(trial) for trial in trials]
    alone_s = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        report = once.sweep(trials, store=folder)
        swept_s = time.process_time() - started
        equal = sum(
            digest(result.state()) == digest(state) and result.value == value
            for result, (state, value) in zip(report.results, alone, strict=True)
        )
        started = time.process_time()
        again = once.sweep(trials, store=folder)
        again_s = time.process_time() - started
    found = {
        "trials": len(trials), "steps_alone": report.steps_alone, "steps_tree": report.steps_tree,
        "steps_computed": report.steps_computed, "bound": report.bound,
        "share_of_bound_reached": report.reached, "alone_cpu_s": alone_s, "sweep_cpu_s": swept_s,
        "cpu_ratio": alone_s / swept_s, "equal_states": equal,
        "steps_of_the_same_sweep_again": again.steps_computed, "again_cpu_s": again_s,
        "accuracies": [result.value for result in report.results],
    }  # fmt: skip
    print(report, f"; {found['cpu_ratio']:.2f}x less CPU time; {equal} of {len(trials)} states "
          "equal", sep="", flush=True)  # fmt: skip
    return found


def extension(segment, num_steps):
    """A run of n steps, extended to 2n: how many steps that trains."""
    with tempfile.TemporaryDirectory() as folder:
        trial = segment.trial(2 * num_steps, lr=0.05)
        once.sweep([trial.until(num_steps)], store=folder)
        report = once.sweep([trial], store=folder)
        equal = digest(report.results[0].state()) == digest(segment.run(trial)[0])
    return {"from": num_steps, "to": 2 * num_steps, "trained": report.steps_computed,
            "equal_state": equal}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_steps, count, repeats = (50, 4, 1) if options.quick else (400, 16, 3)
    segment = once.Segment(
        build, step, evaluate=accuracy, inputs={"images": IMAGES, "digits": DIGITS}
    )
    result = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(), "machine": machine(),
        "config": {"num_steps": num_steps, "trials": count, "repeats": repeats, "threads": 1},
        "late_decays": [
            measure(segment, late_decays(segment, num_steps, count)) for _ in range(repeats)
        ],
        "cosines": [measure(segment, cosines(segment, num_steps, 4))],
        "extension": extension(segment, num_steps),
    }  # fmt: skip
    print(json.dumps(result["extension"]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
