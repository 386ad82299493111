"""DQN with and without stored values: equal return, rows and FLOPs computed; see README.md.

python benchmarks/replay_values/run.py [--quick] [--encoder vector | pictures] [--out FILE]

A run at the same commit goes on with the seeds that are missing.
"""

import argparse
import copy
import datetime
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import trainonce as once

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import commit, default_hardware, machine, read_result, result_path


def load_example():
    path = Path(__file__).parents[2] / "examples" / "05_replay_values.py"
    spec = importlib.util.spec_from_file_location("replay_values", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load_example()


class Plain(EXAMPLE.Recomputed):
    """The network is called on every batch."""

    def __init__(self, network):
        super().__init__(network)
        self.rows = 0

    def __call__(self, numbers):
        self.rows += len(numbers)
        return super().__call__(numbers)


class BatchedRecompute(Plain):
    """Everything that is kept is computed again, in large batches, when the network changes."""

    def __init__(self, network):
        super().__init__(network)
        self.values, self.weights = None, None

    def __call__(self, numbers):
        weights = [parameter._version for parameter in self.network.parameters()]
        done = 0 if self.values is None or weights != self.weights else len(self.values)
        self.weights = weights
        if done < len(self.kept):
            # The last 10,000 are what a buffer of that size holds.
            start = max(done, len(self.kept) - 20_000)
            with torch.no_grad():
                fresh = self.network(torch.stack(self.kept[start:]))
            gap = torch.zeros(start - done, fresh.shape[1])
            before = fresh[:0] if done == 0 else self.values
            self.values = torch.cat([before, gap, fresh])
            self.rows += len(fresh)
        return self.values[torch.as_tensor(numbers)]


def once_each(network):
    return once.ReplayValues(network, capacity=40_000)


class Picture(torch.nn.Module):
    """Draws cart and pole of an observation, and how they move: (n, 4) -> (n, 2, 32, 48)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("across", torch.linspace(-2.4, 2.4, 48)[None, None, :])
        self.register_buffer("up", torch.linspace(1.2, -0.4, 32)[None, :, None])

    def forward(self, seen):
        place, speed, angle, turn = (seen[:, i, None, None] for i in range(4))
        now = self.dots(place, angle)
        later = self.dots(place + 0.1 * speed, angle + 0.1 * turn)
        return torch.stack([now, later - now], 1)

    def dots(self, place, angle):
        cart = (self.across - place) ** 2 + self.up**2
        tip = (self.across - place - angle.sin()) ** 2 + (self.up - angle.cos()) ** 2
        return torch.exp(-20 * cart) + torch.exp(-20 * tip)


class Spread(torch.nn.Module):
    """Features of a random network, each spread over the range of tanh by what it usually is."""

    def __init__(self, stem, usual):
        super().__init__()
        self.stem = stem
        with torch.no_grad():
            found = stem(usual)
        self.register_buffer("mean", found.mean(0))
        self.register_buffer("spread", found.std(0))

    def forward(self, seen):
        return torch.tanh((self.stem(seen) - self.mean) / self.spread)


def picture_networks(seed):
    """A frozen encoder that sees pictures, as in most of deep reinforcement learning."""
    torch.manual_seed(seed)
    stem = torch.nn.Sequential(
        Picture(),
        torch.nn.Conv2d(2, 24, 5, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(24, 48, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(48, 48, 3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(48 * 4 * 8, 64),
    )  # fmt: skip
    usual = (torch.rand(512, 4) - 0.5) * torch.tensor([2.0, 3.0, 0.4, 3.0])
    _, head = EXAMPLE.networks(seed)
    return Spread(stem, usual).requires_grad_(False).eval(), head


ENCODERS = {"vector": EXAMPLE.networks, "pictures": picture_networks}
VARIANTS = {"plain": Plain, "batched recompute": BatchedRecompute, "trainonce": once_each}


def rows_of(values):
    return values.rows if isinstance(values, Plain) else values.report.computed


def flops_a_row(make):
    encoder, head = make(0)
    found = {}
    for name, network, inputs in (("encoder", encoder, 4), ("head", head, 64)):
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, inputs))
        found[name] = counter.get_total_flops()
    return found


def measure(variant, seed, num_steps, make):
    started, started_s = time.process_time(), time.perf_counter()
    returns, encoded, targets = EXAMPLE.train(seed, num_steps, VARIANTS[variant], make=make)
    cpu_s, wall_s = time.process_time() - started, time.perf_counter() - started_s
    flops = flops_a_row(make)
    updates = num_steps - 499
    # What is trained and acted with: the head forward and backward; no way around it.
    needed = updates * 64 * 3 * flops["head"]
    spent = rows_of(encoded) * flops["encoder"] + rows_of(targets) * (
        flops["encoder"] + flops["head"]
    )
    return {
        "seed": seed, "cpu_s": cpu_s, "wall_s": wall_s,
        "episodes": len(returns), "steps": num_steps,
        "mean_return_last_20": statistics.fmean(returns[-20:]),
        "encoder_rows": rows_of(encoded), "target_rows": rows_of(targets),
        "flops_of_frozen_networks": spent, "flops_of_the_head": needed,
    }  # fmt: skip


def polyak(make, num_updates=50):
    """Averaged targets: the network differs at each step, so that nothing hits."""
    encoder, head = make(0)
    target = torch.nn.Sequential(encoder, copy.deepcopy(head)).eval()
    values = once_each(target)
    numbers = [values.add(one) for one in torch.randn(2000, 4)]
    started = time.process_time()
    for number in range(num_updates):
        with torch.no_grad():
            for mine, new in zip(target[1].parameters(), head.parameters(), strict=True):
                mine.mul_(0.995).add_(new + 1e-3, alpha=0.005)
        values(numbers[number * 13 : number * 13 + 64])
    ours_s = time.process_time() - started
    started = time.process_time()
    for _ in range(num_updates):
        with torch.no_grad():
            target(torch.randn(64, 4))
    return {"updates": num_updates, "requested": values.report.requested,
            "computed": values.report.computed,
            "cpu_ratio_to_plain": ours_s / (time.process_time() - started)}  # fmt: skip


def summarise(runs):
    """Return ratios to the plain variant, seed by seed, and the ceiling that the head sets."""
    plain = runs["plain"][0]
    total = plain["flops_of_frozen_networks"] + plain["flops_of_the_head"]
    summary = {"ceiling": total / plain["flops_of_the_head"]}
    for name, found in runs.items():
        spent = [one["flops_of_frozen_networks"] + one["flops_of_the_head"] for one in found]
        summary[name] = {
            "flops_ratio": total / statistics.fmean(spent),
            **{
                f"{clock}_ratio": statistics.median(
                    p[f"{clock}_s"] / one[f"{clock}_s"]
                    for p, one in zip(runs["plain"], found, strict=True)
                )
                for clock in ("cpu", "wall")
            },
            "equal_returns": sum(
                p["mean_return_last_20"] == one["mean_return_last_20"]
                for p, one in zip(runs["plain"], found, strict=True)
            ),
            "mean_return": statistics.fmean(one["mean_return_last_20"] for one in found),
            "stdev_return": statistics.pstdev(one["mean_return_last_20"] for one in found),
        }
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    parser.add_argument("--encoder", choices=ENCODERS, default="vector")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make = ENCODERS[options.encoder]
    num_steps, seeds = (1000, 1) if options.quick else (1500, 5)
    EXAMPLE.train(0, 600, once_each, make=make)  # tracing is paid once a process; not compared
    path = options.out or result_path(__file__, f"{default_hardware()}_{options.encoder}")
    # A run that was cut short goes on with its next seed.
    runs = read_result(path).get("runs") or {name: [] for name in VARIANTS}
    result = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(), "machine": machine(),
        "config": {"encoder": options.encoder, "num_steps": num_steps, "seeds": seeds,
                   "batch": 64, "copy_every": 250},
        "flops_a_row": flops_a_row(make), "runs": runs, "polyak": polyak(make),
    }  # fmt: skip
    for seed in range(min(map(len, runs.values())), seeds):
        for name in VARIANTS:
            runs[name].append(measure(name, seed, num_steps, make))
            print(name, json.dumps(runs[name][-1]), flush=True)
        result["summary"] = summarise(runs)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1), json.dumps(result["polyak"]))


if __name__ == "__main__":
    main()
