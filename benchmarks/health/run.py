"""How early the policy asks for a move, and how often for nothing, against plain thresholds.

    python benchmarks/health/run.py [--devices 64] [--faults 40] [--every 10,30]

writes `results/<date>_<hardware>_<commit>.json`. Signals are simulated (see `Device`): days of
healthy devices with everything that only looks alarming, and hours in which a fault develops. Ours
reads more often while a temperature rises; "fixed" is the same policy over a source that cannot.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from trainonce.clock import SystemClock
from trainonce.fleet.feed import read_all
from trainonce.fleet.health import Action, judge
from trainonce.fleet.signals import Reading
from trainonce.fleet.sources.choose import open_sources
from trainonce.fleet.watch import HealthWatch

HERE = Path(__file__).parent
DAY_S, HOUR_S = 86_400, 3600
SLOWDOWN_C, SHUTDOWN_C = 87.0, 92.0
FAULT_AT_S = 1800
# Healthy devices: at least how hot they run, seconds between changes of their work, and for how
# many of `--devices`.
HEALTHY = {"any work": (62.0, 7200, 1.0), "hot work": (79.0, 900, 0.25)}
# Kind -> what happens from half an hour on; see `Device.read`.
FAULTS = ("cooling gone at once", "cooling lost", "cooling degrades", "row remap fails",
          "NVLink degrades", "XID 79", "no sign")  # fmt: skip


class Device:
    """One device: work that changes, ambient drift, noise, wrong readings, users' own XIDs."""

    def __init__(self, rng: np.random.Generator, kind: str, length_s: int) -> None:
        self.rng = rng
        self.fault = "" if kind in HEALTHY else kind
        coolest_c, turn_s, _ = HEALTHY.get(kind, HEALTHY["any work"])
        # Up to a degree below slow-down, with the room's drift: what runs hot is not yet failing.
        self.idle_c, self.load_c = rng.uniform(32, 42), rng.uniform(coolest_c, 83)
        self.tau_s = rng.uniform(15, 200)
        num_turns = 0 if self.fault else max(1, length_s // turn_s)
        self.turns = np.sort(rng.uniform(0, length_s, num_turns))
        # Of full power: none, all, or some of it, as in an evaluation between two epochs.
        self.works = rng.choice([0.0, 0.5, 0.8, 1.0], num_turns + 1)
        self.works[0] = 1.0
        self.idle_w, self.load_w = rng.uniform(70, 120), rng.uniform(400, 700)
        self.energy_j = 0.0
        self.phase = rng.uniform(0, 2 * np.pi)
        self.now_c, self.read_s = self.load_c, 0.0
        self.nvlink = self.pcie = self.corrected = 0
        self.rate_c_per_min = {
            "cooling gone at once": rng.uniform(8, 30), "cooling lost": rng.uniform(2, 6),
            "cooling degrades": rng.uniform(0.5, 1.5),
        }.get(kind, 0.0)  # fmt: skip
        self.died_s: float | None = None

    def read(self, now_s: float) -> Reading:
        rng = self.rng
        passed_s, self.read_s = now_s - self.read_s, now_s
        # What happens between two readings counts where a device may die of it.
        steps = max(1, round(passed_s)) if self.rate_c_per_min else 1
        for step in range(steps - 1, -1, -1):
            self._warm(now_s - step * passed_s / steps, passed_s / steps)
        since_s = max(0.0, now_s - FAULT_AT_S) if self.fault else 0.0
        shown: float | None = round(self.now_c + 0.7 * rng.standard_normal())
        odd = rng.random()
        if odd < 1e-3:
            shown = None
        elif odd < 1.2e-3:
            shown = float(rng.choice([0.0, 120.0, 255.0]))
        self.pcie += rng.poisson(10 * passed_s / DAY_S)
        self.corrected += rng.poisson(5 * passed_s / DAY_S)
        errors_per_h = 20 / 24
        if self.fault == "NVLink degrades" and since_s:
            errors_per_h = 600
        self.nvlink += rng.poisson(errors_per_h * passed_s / HOUR_S)
        xids = tuple(rng.choice([13, 31, 43], rng.poisson(passed_s / DAY_S)).tolist())
        if self.fault == "XID 79" and since_s and self.died_s is None:
            xids = (*xids, 79)
        gone = {
            "row remap fails": since_s >= 600, "XID 79": since_s > 0, "no sign": since_s > 0,
        }.get(self.fault, False)  # fmt: skip
        if gone and self.died_s is None:
            self.died_s = now_s
        return Reading(
            mono_s=now_s, host="h", device="gpu0", temperature_c=shown, slowdown_c=SLOWDOWN_C,
            shutdown_c=SHUTDOWN_C, throttled_thermal_s=0.0, throttled_brake_s=0.0,
            recovery_action=0,
            row_remap_failed=int(self.fault == "row remap fails" and since_s > 0),
            row_remap_pending=0, ecc_uncorrected_total=0, ecc_corrected_total=self.corrected,
            nvlink_errors_total=self.nvlink, pcie_replays_total=self.pcie, xids=xids,
            energy_j=self.energy_j,
        )  # fmt: skip

    def _warm(self, now_s: float, passed_s: float) -> None:
        work = self.works[np.searchsorted(self.turns, now_s)]
        watts = self.idle_w + work * (self.load_w - self.idle_w)
        self.energy_j += watts * passed_s * self.rng.normal(1, 0.03)
        ambient = 3 * np.sin(2 * np.pi * now_s / DAY_S + self.phase)
        target = self.idle_c + work * (self.load_c - self.idle_c) + ambient
        target += self.rate_c_per_min * max(0.0, now_s - FAULT_AT_S) / 60
        self.now_c += (target - self.now_c) * (1 - np.exp(-passed_s / self.tau_s))
        if self.now_c >= SHUTDOWN_C and self.died_s is None:
            self.died_s = now_s


class Ours:
    """The policy over a source that is read as often as it asks for."""

    def __init__(self) -> None:
        self.watch = HealthWatch()

    def look(self, reading: Reading) -> Action:
        return self.watch.observe([reading])["h", "gpu0"].action

    def next_s(self, every_s: float) -> float:
        return self.watch.next_look_s(every_s)


class OursFixed(Ours):
    """The same where readings come when they come: an exporter, a file."""

    def next_s(self, every_s: float) -> float:
        return every_s


class Thresholds:
    """The baseline: alert rules of a kind often written; what fires would move the rank."""

    def __init__(self) -> None:
        self.first: Reading | None = None

    def look(self, reading: Reading) -> Action:
        self.first = self.first or reading
        hot = reading.temperature_c is not None and reading.temperature_c >= SLOWDOWN_C - 2
        if hot or reading.xids or reading.row_remap_failed:
            return Action.MIGRATE
        assert reading.nvlink_errors_total is not None
        assert self.first.nvlink_errors_total is not None
        grown = reading.nvlink_errors_total > self.first.nvlink_errors_total
        return Action.SUSPECT if grown else Action.NONE

    def next_s(self, every_s: float) -> float:
        return every_s


METHODS: dict[str, type[Ours | Thresholds]] = {
    "trainonce": Ours, "trainonce, fixed": OursFixed, "thresholds": Thresholds,
}  # fmt: skip


def walk(seed: int, kind: str, length_s: int, method: str, every_s: float) -> dict[str, Any]:
    """Return when the method first asked for what, and how often it began to."""
    device, judge_it = Device(np.random.default_rng(seed), kind, length_s), METHODS[method]()
    before, first, begun = Action.NONE, dict[str, float](), {"MIGRATE": 0, "SUSPECT": 0}
    now_s, readings = 0.0, 0
    while now_s < length_s:
        reading = device.read(now_s)
        if device.died_s is not None and device.died_s < now_s:
            break  # nobody can be read any more
        action = judge_it.look(reading)
        readings += 1
        if action is not before and action >= Action.SUSPECT:
            begun[action.name] += 1
            first.setdefault(action.name, now_s)
        before = action
        if device.died_s is not None:
            break
        now_s += judge_it.next_s(every_s)
    return {"first_s": first, "begun": begun, "died_s": device.died_s, "readings": readings}


def walks(
    seeds: range, kind: str, length_s: int, method: str, every_s: float
) -> list[dict[str, Any]]:
    with ProcessPoolExecutor() as pool:
        return list(
            pool.map(walk, seeds, repeat(kind), repeat(length_s), repeat(method), repeat(every_s))
        )


def fault_row(fault: str, method: str, every_s: float, seeds: int) -> dict[str, Any]:
    runs = walks(range(seeds), fault, 3 * HOUR_S, method, every_s)
    early = [run for run in runs if run["first_s"].get("MIGRATE", -1) >= 0]
    right = [run for run in early if run["first_s"]["MIGRATE"] >= FAULT_AT_S]
    leads = [run["died_s"] - run["first_s"]["MIGRATE"] for run in right if run["died_s"]]
    return {
        "fault": fault, "method": method, "every_s": every_s, "of": seeds, "migrate": len(right),
        "before_the_fault": len(early) - len(right),
        "suspect": sum(run["first_s"].get("SUSPECT", -1) >= FAULT_AT_S for run in runs),
        "ahead_of_death": sum(lead > 0 for lead in leads),
        "median_lead_s": statistics.median(leads) if leads else None, "leads_s": leads,
    }  # fmt: skip


def cost() -> dict[str, Any]:
    """What reading this host and judging a device take, milliseconds."""
    opened = open_sources(["auto"], host="h", clock=SystemClock(), disk=HERE)
    reads, judged = [], []
    for _ in range(50):
        begun = time.perf_counter()
        read_all(opened)
        reads.append(1000 * (time.perf_counter() - begun))
    opened.close()
    device = Device(np.random.default_rng(0), "any work", HOUR_S)
    history = [device.read(10.0 * i) for i in range(60)]
    for _ in range(200):
        begun = time.perf_counter()
        judge(history)
        judged.append(1000 * (time.perf_counter() - begun))
    names = [source.name for source in opened.sources]
    return {
        "sources": names, "read_ms_median": statistics.median(reads),
        "judge_ms_median": statistics.median(judged), "read_ms": reads,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=64, help="healthy ones, a day each kind")
    parser.add_argument("--faults", type=int, default=40, help="of each kind")
    parser.add_argument("--every", default="10,30", help="seconds between readings")
    args = parser.parse_args()
    intervals_s = [float(each) for each in args.every.split(",")]
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=HERE, capture_output=True, text=True).stdout.strip()
    healthy, faults = [], []
    for every_s, method in itertools.product(intervals_s, METHODS):
        for kind, (_, _, share) in HEALTHY.items():
            days = round(share * args.devices)
            runs = walks(range(10_000, 10_000 + days), kind, DAY_S, method, every_s)
            healthy.append(
                {"kind": kind, "method": method, "every_s": every_s, "device_days": days,
                 "false_migrates": sum(run["begun"]["MIGRATE"] for run in runs),
                 "false_suspects": sum(run["begun"]["SUSPECT"] for run in runs),
                 "readings": sum(run["readings"] for run in runs)}
            )  # fmt: skip
            print(healthy[-1], flush=True)
        for fault in FAULTS:
            faults.append(fault_row(fault, method, every_s, args.faults))
            print({k: v for k, v in faults[-1].items() if k != "leads_s"}, flush=True)
    record = {
        "configuration": {"devices": args.devices, "faults": args.faults, "every_s": intervals_s},
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     "kernel": platform.release()},
        "healthy": healthy, "faults": faults, "cost": cost(),
    }  # fmt: skip
    print({key: value for key, value in record["cost"].items() if key != "read_ms"})
    name = f"{datetime.now(UTC):%Y-%m-%d}_{os.cpu_count()}-core-cpu_{commit}"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
