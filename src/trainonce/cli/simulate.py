"""`trainonce simulate`: what failures cost a cluster, by size, policy and number of spares."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.simulate import plot, study, table
from trainonce.simulate.config import find_policy, parse_rates, read_config
from trainonce.simulate.failures import RATES
from trainonce.simulate.policies import POLICIES, Policy
from trainonce.simulate.scenario import Scenario

if TYPE_CHECKING:
    import argparse

_PROGRESS_EVERY_S = 5.0
_MAX_SEEDS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--gpus", type=int, help="GPUs of the job (default 2048)")
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"what the job does on a failure; again for more (default all): {', '.join(POLICIES)}",
    )
    parser.add_argument(
        "--rates",
        metavar="NAME|R",
        help=f"failure rates: {', '.join(RATES)}, or failures per node-day (default rsc-1)",
    )
    parser.add_argument(
        "--spares",
        metavar="N|SHARE|auto",
        help="idle spare nodes, 3 or 2%% (default auto: what pays off)",
    )
    parser.add_argument("--days", type=float, help="simulated time (default 365)")
    parser.add_argument("--seeds", type=int, default=16, help="jobs to simulate (default 16)")
    parser.add_argument("--price", type=float, metavar="USD", help="of a GPU-hour (default 3)")
    parser.add_argument(
        "--rebuild-pause-s",
        type=float,
        metavar="S",
        help="pause of a rebuild under trainonce, as measured",
    )
    parser.add_argument(
        "--migrate-pause-s", type=float, metavar="S", help="the same for a planned move"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--sweep",
        nargs="?",
        const="64:16384",
        metavar="FROM:TO",
        help="every size from FROM to TO GPUs, doubling (64:16384)",
    )
    what.add_argument(
        "--find-spares", action="store_true", help="how many idle spares pay off, by policy"
    )
    parser.add_argument("--config", type=Path, metavar="TOML", help="scenario and policies")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw to a .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Simulate and print."""
    if not 2 <= args.seeds <= _MAX_SEEDS:
        raise ConfigError(
            f"--seeds must lie between 2 and {_MAX_SEEDS}, not {args.seeds}",
            hint="the interval comes from the spread over seeds; 16 is usual",
        )
    scenario, policies = _read(args)
    seeds = range(args.seeds)
    progress = _Progress()
    if args.find_spares:
        idle = [policy for policy in policies if policy.spare_source == "idle"]
        if not idle:
            raise ConfigError(
                "--find-spares needs a policy that holds idle spares",
                hint="these borrow theirs: " + ", ".join(p.name for p in policies),
            )
        study.check_size(study.expected_search_events(scenario, idle, args.seeds))
        studies = [study.find_spares(scenario, policy, seeds, progress) for policy in idle]
        progress.done()
        records: list[dict[str, Any]] = [each.to_record() for each in studies]
        text = "\n\n".join(f"{s.best.policy.name}\n{table.spares_table(s)}" for s in studies)
        if args.plot:
            plot.plot_spares(studies, args.plot)
    else:
        sizes = _sizes(args.sweep, scenario) if args.sweep else [scenario.num_gpus]
        results = study.sweep(scenario, policies, sizes, seeds, progress)
        progress.done()
        records = [result.to_record() for result in results]
        text = table.sweep_table(results) if args.sweep else table.comparison_table(results)
        if args.plot:
            plot.plot_sweep(results, args.plot)
    if args.json:
        print(json.dumps({"scenario": _record(scenario), "seeds": args.seeds, "results": records}))
    else:
        print(f"{_heading(scenario, args)}\n\n{text}")
    return 0


def _read(args: argparse.Namespace) -> tuple[Scenario, list[Policy]]:
    """Return scenario and policies; an option goes before the file, the file before defaults."""
    settings, known = read_config(args.config) if args.config else ({}, dict(POLICIES))
    settings.setdefault("num_gpus", 2048)
    for option, name in (
        ("gpus", "num_gpus"),
        ("days", "days"),
        ("price", "price_usd_per_gpu_h"),
    ):
        if getattr(args, option) is not None:
            settings[name] = getattr(args, option)
    if args.rates is not None:
        settings["rates"] = parse_rates(args.rates)
    if args.spares is not None:
        settings |= _spares(args.spares)
    measured = {"live_pause_s": args.rebuild_pause_s, "migrate_pause_s": args.migrate_pause_s}
    measured = {name: value for name, value in measured.items() if value is not None}
    for name in ("trainonce", "trainonce-low-priority"):
        known[name] = dataclasses.replace(known[name], **measured)
    names = [name for given in args.policy or [] for name in given.split(",")] or list(known)
    return Scenario(**settings), [find_policy(name, known) for name in dict.fromkeys(names)]


def _spares(text: str) -> dict[str, float | None]:
    """Return the scenario's settings for `text`; a share is of each size of a sweep."""
    try:
        if text == "auto":
            return {"spares": None, "spares_share": None}
        if text.endswith("%"):
            return {"spares": None, "spares_share": float(text[:-1]) / 100}
        return {"spares": int(text), "spares_share": None}
    except ValueError as error:
        raise ConfigError(
            f"--spares cannot be {text!r}", hint="a number of nodes, a share such as 2%, or auto"
        ) from error


def _sizes(text: str, scenario: Scenario) -> list[int]:
    first, _, last = text.partition(":")
    try:
        size, end = int(first), int(last)
    except ValueError as error:
        raise ConfigError(
            f"--sweep cannot be {text!r}", hint="FROM:TO in GPUs, for example 64:16384"
        ) from error
    sizes: list[int] = []
    while 0 < size <= end:
        sizes.append(dataclasses.replace(scenario, num_gpus=size).num_gpus)
        size *= 2
    if not sizes:
        raise ConfigError(f"--sweep {text} holds no size", hint="FROM:TO with 0 < FROM <= TO")
    return sizes


def _record(scenario: Scenario) -> dict[str, Any]:
    record = dataclasses.asdict(scenario)
    record["failures_per_node_day"] = scenario.rates.per_node_day(scenario.num_gpus)
    return record


def _heading(scenario: Scenario, args: argparse.Namespace) -> str:
    size = f"{args.sweep} GPUs" if args.sweep else f"{scenario.num_gpus:,} GPUs"
    mttf = "" if args.sweep else f", a failure every {scenario.mttf_s / 3600:.1f} h"
    return (
        f"{size} for {scenario.days:g} days at ${scenario.price_usd_per_gpu_h:g} a GPU-hour, "
        f"rates {scenario.rates.name}{mttf}; means of {args.seeds} seeds, ± is a 95 % interval"
    )


class _Progress:
    """A line on stderr once the work takes longer than a few seconds."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()
        self._live = sys.stderr.isatty()
        self._wrote = False

    def __call__(self, done: int, total: int, label: str) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < (0.2 if self._wrote and self._live else _PROGRESS_EVERY_S):
            return
        self._shown_s, self._wrote = now_s, True
        line = f"simulated {done} of {total} jobs: {label}"
        print(f"\r{line:<78}" if self._live else line, end="" if self._live else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def done(self) -> None:
        """End the line, if one was begun."""
        if self._wrote and self._live:
            print(file=sys.stderr)
