"""How well faulty links are named: on simulated fat trees, and in a real-kernel Clos.

    python benchmarks/links/run.py [--seeds 100] [--rounds 2] [--no-clos]

writes `results/<date>_<hardware>_<commit>.json` and the plot beside it. The Clos needs root.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from trainonce.fleet.links.fattree import FatTree
from trainonce.fleet.links.locate import Observations, locate
from trainonce.fleet.links.topology import build_fabric
from trainonce.testing.clos import Clos, why_no_faults
from trainonce.testing.namespaces import NetworkLab

HERE = Path(__file__).parent
FAULTS, FLOWS_PER_HOST, BACKGROUND = 8, 20, 5e-5
LOSSES = (0.003, 0.005, 0.01, 0.05)
PACKETS = (10, 25, 50, 100, 200, 400)


def ours(observed: Observations) -> set[str]:
    return {finding.component for finding in locate(observed)}


def voting(observed: Observations) -> set[str]:
    """The baseline, after 007 (Arzani et al., NSDI 2018): each bad flow votes for its links."""
    paths = observed.paths[:, : observed.num_links].tocsr()
    over = paths.T.tocsr()
    length = np.asarray(paths.sum(axis=1)).ravel()
    votes = (observed.bad > 0) / length
    total, named = votes.sum(), set()
    while len(named) < 60:
        tally = over @ votes
        best = int(tally.argmax())
        if tally[best] < 0.01 * total or tally[best] == 0:
            break
        named.add(observed.components[best])
        votes[over[best].indices] = 0
    return named


METHODS: dict[str, Callable[[Observations], set[str]]] = {"trainonce": ours, "voting": voting}


def fat_tree(tree: FatTree, seeds: int, faults: int, loss: float, packets: int) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rates = np.full(tree.num_links, BACKGROUND)
        bad = rng.choice(tree.num_links, faults, replace=False)
        rates[bad] = loss
        observed = tree.observe(rng, rates, flows_per_host=FLOWS_PER_HOST, packets=packets)
        true = {tree.names[i] for i in bad}
        for name, method in METHODS.items():
            begin = time.perf_counter()
            named = method(observed)
            rows[name].append(
                {"named": len(named), "right": len(named & true),
                 "s": round(time.perf_counter() - begin, 5)}
            )  # fmt: skip
    summary: dict[str, Any] = {"faults": faults, "loss": loss, "packets": packets}
    for name, each in rows.items():
        right, named = (sum(row[key] for row in each) for key in ("right", "named"))
        summary[name] = {
            "precision": right / named if named else 1.0,
            "recall": right / (faults * seeds) if faults else 1.0,
            "false": named - right,
            "median_s": float(np.median([row["s"] for row in each])),
            "every": [[row["named"], row["right"]] for row in each],
        }
    return summary


def clos_rounds(rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with NetworkLab() as lab, tempfile.TemporaryDirectory() as folder:
        clos = Clos(lab)
        for per_mille in (0, 30, 10, 5):
            for link in clos.links * rounds if per_mille else clos.links[:10]:
                if per_mille:
                    clos.lose(link, per_mille)
                records = clos.probe(Path(folder), "--rate-per-s", "4000")
                if per_mille:
                    clos.heal(link)
                fabric = build_fabric(records, clos.names)
                named = [finding.component for finding in locate(fabric.loss())]
                lost = sum(flow.lost for flow in fabric.flows if link in flow.links())
                rows.append(
                    {"link": link if per_mille else None, "per_mille": per_mille, "named": named,
                     "lost": lost}
                )  # fmt: skip
                print(per_mille, link if per_mille else "healthy", lost, named, flush=True)
    return rows


def plot(sweep: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "recall"), (right, "precision")):
        for i, loss in enumerate(LOSSES):
            rows = [row for row in sweep if row["loss"] == loss]
            axes.plot(
                [row["packets"] for row in rows],
                [row["trainonce"][key] for row in rows],
                marker="osD^"[i],
                linestyle=("-", "--", "-.", ":")[i],
                label=f"{loss:.1%} loss",
            )
        axes.set_xscale("log")
        axes.set_xticks(PACKETS, [str(packets) for packets in PACKETS])
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(f"probes a flow, {FLOWS_PER_HOST} flows a host")
        axes.set_title(f"{key} of 8 faulty links, 1,024 hosts", fontsize=10)
        axes.grid(visible=True, alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-clos", action="store_true")
    args = parser.parse_args()
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=HERE, capture_output=True, text=True).stdout.strip()
    name = f"{datetime.now(UTC):%Y-%m-%d}_{os.cpu_count()}-core-cpu_{commit}"
    tree = FatTree(16)
    sweep = [
        fat_tree(tree, args.seeds, FAULTS, loss, packets) for loss in LOSSES for packets in PACKETS
    ]
    healthy = [fat_tree(tree, args.seeds, 0, 0.0, packets) for packets in (100, 400)]
    for row in [*sweep, *healthy]:
        print(row["loss"], row["packets"], *(
            f"{m}: P {row[m]['precision']:.3f} R {row[m]['recall']:.3f} false {row[m]['false']}"
            for m in METHODS), flush=True)  # fmt: skip
    reason = "--no-clos" if args.no_clos else why_no_faults()
    record = {
        "configuration": {
            "hosts": tree.num_hosts, "directed_links": tree.num_links, "seeds": args.seeds,
            "flows_per_host": FLOWS_PER_HOST, "background_loss": BACKGROUND,
        },
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     "scipy": scipy.__version__, "kernel": platform.release()},
        "sweep": sweep,
        "healthy": healthy,
        "clos": {"skipped": reason} if reason else clos_rounds(args.rounds),
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(record) + "\n")
    plot(sweep, HERE / "results" / f"{name}.png")


if __name__ == "__main__":
    main()
