"""Train through a migration and a kill, and show that nothing was lost: `make demo`.

Runs `01_survive_a_kill.py` twice: with a planned migration and a SIGKILL on the way, and
without faults. Then it compares what both ended with, and draws the loss with the incidents.
Exits with 1 if the results differ, or if a fault did not fire.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

SCRIPT = Path(__file__).with_name("01_survive_a_kill.py")
TRAINONCE = [sys.executable, "-m", "trainonce.cli.main"]
STEP = re.compile(r"step (\d+) loss (\d+\.\d+)")
DIGEST = re.compile(r"rank (\d+) digest ([0-9a-f]{64})")


@dataclass
class Outcome:
    """What a training run printed, and what the ledger says of it."""

    losses: dict[int, float] = field(default_factory=dict)
    seen_s: dict[int, float] = field(default_factory=dict)  # since the run began
    digests: dict[int, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """The incidents of the ledger, as they happened."""
        return [each["event"] for each in self.report["incidents"]]


def train(output: Path, job: str, options: list[str], steps: int) -> Outcome:
    """Run the example to its end. Its progress goes to stderr, as the launcher prints it."""
    environment = os.environ | {"TRAINONCE_HOME": str(output / "home"), "OMP_NUM_THREADS": "1"}
    command = [*TRAINONCE, "run", "--nproc-per-node", "2", "--job-id", job, *options]
    command += [str(SCRIPT), "--steps", str(steps), "--log-every", "1"]
    begin_s = time.monotonic()
    outcome = Outcome()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            # Ranks share the pipe, so two prints can stand in one line.
            for step, loss in STEP.findall(line):
                outcome.losses[int(step)] = float(loss)
                outcome.seen_s.setdefault(int(step), time.monotonic() - begin_s)
            outcome.digests |= {int(rank): digest for rank, digest in DIGEST.findall(line)}
    if process.returncode != 0:
        sys.exit(f"FAILED: job {job} ended with exit code {process.returncode}")
    report = subprocess.run(
        [*TRAINONCE, "report", job, "--json"], env=environment, stdout=subprocess.PIPE, check=True
    )
    outcome.report = json.loads(report.stdout)["jobs"][0]
    return outcome


def problems(faulty: Outcome, clean: Outcome, steps: int) -> list[str]:
    """Return what is not as it should be; empty if all is well."""
    found: list[str] = []
    fired = sorted((each["cause"], each["detail"]) for each in faulty.incidents)
    if fired != [("migration", "on request"), ("signal", "SIGKILL")]:
        found.append(f"a migration and a SIGKILL were planned, and this happened: {fired}")
    if clean.incidents:
        found.append("the run without faults had incidents")
    if sorted(faulty.digests) != [0, 1] or sorted(clean.digests) != [0, 1]:
        found.append("a rank did not print its digest")
    if len({*faulty.digests.values(), *clean.digests.values()}) != 1:
        found.append(f"the digests differ: {faulty.digests} and {clean.digests}")
    if sorted(faulty.losses) != list(range(1, steps + 1)) or faulty.losses != clean.losses:
        found.append("the losses differ")
    if any(each["steps_lost"] for each in faulty.incidents):
        found.append("committed steps were lost")
    return found


def label(incident: dict[str, Any]) -> str:
    """Return two lines for the plot."""
    rank = incident["ranks"][0]
    what = "moved to a spare" if incident["planned"] else "killed"
    return f"rank {rank} {what}\npaused {incident['pause_s'] * 1e3:.0f} ms"


def plot(path: Path, faulty: Outcome, clean: Outcome) -> None:
    """Draw loss and time by step, with the incidents."""
    steps = sorted(clean.losses)
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(9, 6), height_ratios=(3, 1.4), sharex=True, layout="constrained"
        )
    loss_of = [faulty.losses[step] for step in steps]
    above.plot(steps, loss_of, color="#0072B2", linewidth=1.4, label="with a migration and a kill")
    every = steps[:: max(len(steps) // 40, 1)]
    above.plot(
        every, [clean.losses[step] for step in every], "o", color="#D55E00", markersize=4.5,
        markerfacecolor="none", label="without faults",
    )  # fmt: skip
    above.set_ylabel("loss (nats per byte, mean of both ranks)")
    above.legend(frameon=False, loc="upper right")
    above.set_title("Same losses, same final bits", loc="left", fontweight="bold")
    passed_ms = [1e3 * (faulty.seen_s[step] - faulty.seen_s[step - 1]) for step in steps[1:]]
    below.plot(steps[1:], passed_ms, color="#0072B2", linewidth=0.9)
    below.set_ylim(0, None)
    below.set_ylabel("ms from\nstep to step")
    below.set_xlabel("committed step")
    for incident in faulty.incidents:
        for axes in (above, below):
            axes.axvline(incident["step"], color="0.45", linestyle="--", linewidth=1)
        above.annotate(
            label(incident), (incident["step"], 0.72), xycoords=("data", "axes fraction"),
            xytext=(6, 0), textcoords="offset points", color="0.25",
        )  # fmt: skip
    below.set_xlim(0, steps[-1])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    # Half the run lies between the two: time for another spare to start.
    move, kill = args.steps // 4, 3 * args.steps // 4
    plan = f"migrate rank=0 step={move}; kill rank=1 step={kill} point=backward"
    stamp = time.strftime("%H%M%S")

    print(f"1. {args.steps} steps on two ranks and a spare, with faults: {plan}", flush=True)
    faulty = train(output, f"faulty-{stamp}", ["--spares", "1", "--chaos", plan], args.steps)
    print("\n2. The same without faults", flush=True)
    clean = train(output, f"clean-{stamp}", [], args.steps)

    print("\n3. What came of it")
    for name, outcome in (("with faults", faulty), ("without", clean)):
        for rank, digest in sorted(outcome.digests.items()):
            print(f"   {name:>11}, rank {rank}: {digest}")
    for each in faulty.report["incidents"]:
        print(f"   {each['sentence']}")
    found = problems(faulty, clean, args.steps)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    if found:
        return 1
    plot(output / "loss.png", faulty, clean)
    pauses = ", ".join(f"{each['pause_s'] * 1e3:.0f} ms" for each in faulty.incidents)
    print("   All digests and all losses are equal: parameters and optimizer, bit for bit.")
    print(f"   Lost: 0 committed steps. Paused: {pauses}.")
    print(f"   Loss with the incidents: {output / 'loss.png'}")
    command = Path(sys.executable).with_name("trainonce")
    print(f"   More: {command} report faulty-{stamp} --home {output / 'home'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
