"""Tables and plots of studies, made from their result files alone."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TITLES = {
    "default": "default recipe",
    "tuned": "tuned baseline",
    "tuned-fast": "tuned, to the default's quality",
    "candidate": "levers, to the tuned baseline's quality",
    "candidate-fast": "levers, to the default's quality",
    "shorter": "control: tuned, shorter schedule",
    "subset": "control: tuned, random subset",
    "default-shorter": "control: default, shorter schedule",
}


def comparison_table(record: dict[str, Any]) -> str:
    """Return the arms as a Markdown table: quality, compute, and savings against both."""
    metric = record["task"]["metric"]
    rows = [
        (
            f"| arm | recipe | {metric} | GFLOP | CPU s | equal to default / tuned "
            "| FLOPs saved vs default / tuned | CPU saved vs default / tuned |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in record["arms"]:
        runs = arm["runs"]
        usage = [run["usage"] for run in runs]
        cells = [
            _TITLES[arm["role"]],
            arm["recipe"]["name"],
            _losses(runs),
            f"{_mean([u['flops'] for u in usage]) / 1e9:.1f}",
            f"{_mean([u['cpu_s'] for u in usage]):.1f}",
            _pair(arm, lambda c: "yes" if c["equal"] else "no"),
            _pair(arm, lambda c: f"{c['saved']['flops']:.0%}"),
            _pair(arm, lambda c: f"{c['saved']['cpu_s']:.0%}"),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def summary_table(records: Sequence[dict[str, Any]]) -> str:
    """Return one row a study and arm: what tuning saves, and what levers save, against both."""
    rows = [
        (
            "| task, size | arm | recipe | equal to default / tuned "
            "| FLOPs saved vs default / tuned | CPU saved vs default / tuned |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        where = f"{record['task']['name']}, {record['options'].get('size', 'medium')}"
        for arm in record["arms"]:
            if arm["role"] not in ("tuned-fast", "candidate-fast", "candidate"):
                continue
            cells = [
                where,
                _TITLES[arm["role"]],
                arm["recipe"]["name"],
                _pair(arm, lambda c: "yes" if c["equal"] else "no"),
                _pair(arm, lambda c: f"{c['saved']['flops']:.0%}"),
                _pair(arm, lambda c: f"{c['saved']['cpu_s']:.0%}"),
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def bounds_table(record: dict[str, Any]) -> str:
    """Return the paired differences as a Markdown table, with their upper 95 % bounds."""
    margin = record["task"]["margin"]
    rows = [
        f"| arm | against | mean difference | upper 95 % bound | margin {margin:g} |",
        "|---|---|---|---|---|",
    ]
    for arm in record["arms"]:
        for reference in ("default", "tuned"):
            found = arm[f"against_{reference}"]
            if found is not None:
                numbers = [_signed(found["mean_difference"]), _signed(found["upper_bound"])]
                within = "within" if found["equal"] else "**beyond**"
                cells = [_TITLES[arm["role"]], _TITLES[reference], *numbers, within]
                rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def accounts_table(record: dict[str, Any]) -> str:
    """Return savings with tuning paid on both sides, over 1 and 10 runs, as Markdown."""
    arms = [arm for arm in record["arms"] if arm["role"].startswith("candidate")]
    names = list(arms[0]["saved_with_tuning"]["default"])
    rows = [
        "| arm | against | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for arm in arms:
        for reference, accounts in arm["saved_with_tuning"].items():
            cells = [_TITLES[arm["role"]], _TITLES[reference]]
            cells += [
                "not measured" if accounts[n] is None else f"{accounts[n]:.0%}" for n in names
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def page(record: dict[str, Any]) -> str:
    """Return everything about one study as Markdown."""
    env, task = record["environment"], record["task"]
    gpu = f", {env['gpu']}" if env["gpu"] else ""
    head = (
        f"### {task['name']}\n\n"
        f"{len(record['reporting_seeds'])} reporting seeds, {len(record['tuning_seeds'])} tuning "
        f"seeds; {env['cpu']}{gpu}, torch {env['versions']['torch']}, commit {env['commit']}.\n"
    )
    parts = [head, comparison_table(record), bounds_table(record), accounts_table(record)]
    return "\n\n".join([*parts, *record["notes"]]) + "\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw loss against FLOPs: every tuning run's mean, and the reported arms with all seeds.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'trainonce[plot]'`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for arm, marker in zip(record["arms"], "os*D^vPX", strict=False):
        runs = [run for run in arm["runs"] if run["loss"] is not None]
        gflop = [run["usage"]["flops"] / 1e9 for run in runs]
        axes.plot(
            gflop,
            [run["loss"] for run in runs],
            marker,
            alpha=0.6,
            label=textwrap.fill(f"{_TITLES[arm['role']]} ({arm['recipe']['name']})", 96),
        )
    axes.set_xlabel("GFLOP of a run")
    axes.set_ylabel(record["task"]["metric"])
    found = [run["loss"] for arm in record["arms"] for run in arm["runs"]]
    losses = [loss for loss in found if loss is not None]
    if losses and min(losses) >= 0 > axes.get_ylim()[0]:
        axes.set_ylim(bottom=0)
    axes.set_title(f"{record['task']['name']}: each point is one seed")
    figure.legend(loc="outside lower left", fontsize="x-small")
    figure.savefig(path, dpi=120)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _losses(runs: list[dict[str, Any]]) -> str:
    losses = [run["loss"] for run in runs]
    if None in losses:
        return f"diverged ({losses.count(None)} of {len(losses)})"
    mean = _mean(losses)
    spread = (sum((x - mean) ** 2 for x in losses) / max(len(losses) - 1, 1)) ** 0.5
    return f"{mean:.4f} ± {spread:.4f}"


def _pair(arm: dict[str, Any], show: Any) -> str:
    parts = [arm["against_default"], arm["against_tuned"]]
    return " / ".join("–" if part is None else show(part) for part in parts)


def _signed(value: float | None) -> str:
    return "not finite" if value is None else f"{value:+.4f}"
