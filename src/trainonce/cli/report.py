"""`trainonce report`: incidents, guarantee, time, money and energy, from the ledger alone."""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.ledger import prices
from trainonce.ledger.budget import BudgetWatch, amounts, post
from trainonce.ledger.page import page
from trainonce.ledger.report import build, to_json
from trainonce.ledger.store import Ledger
from trainonce.ledger.text import render

if TYPE_CHECKING:
    import argparse
    import threading

    from trainonce.ledger.prices import EconomicsSettings
    from trainonce.ledger.report import Report

_UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("job", nargs="?", help='a job, the beginning of its id, or "last"')
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write one HTML page")
    parser.add_argument("--project", help="only jobs with this project tag")
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="only jobs begun since a date or for as long: 2026-01-31, 7d",
    )
    parser.add_argument(
        "--audit", action="store_true", help="print the arithmetic behind each saving"
    )
    parser.add_argument(
        "--alert", action="store_true", help="tell the webhooks of budgets that were crossed"
    )
    parser.add_argument("--home", type=Path, help="folder of the ledger (TRAINONCE_HOME)")
    parser.add_argument("--usd-per-gpu-hour", type=float, metavar="USD")
    parser.add_argument("--country", metavar="CODE", help="for CO2: three letters, such as FRA")
    parser.add_argument("--carbon-g-per-kwh", type=float, metavar="G")
    parser.add_argument("--pue", type=float, help="facility energy over device energy (1.0)")
    parser.add_argument(
        "--gpu-tdp-w", type=float, metavar="W", help="for estimates where energy was not measured"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit code."""
    home: Path = args.home or settings.home()
    now_wall_s = time.time()
    flags = {
        name: getattr(args, name)
        for name in ("usd_per_gpu_hour", "country", "carbon_g_per_kwh", "pue", "gpu_tdp_w")
    }
    economics = prices.load(home, flags)
    ledger = Ledger.open(home, on_error=_warn)
    report = build(
        ledger,
        economics,
        now_wall_s,
        job=args.job,
        project=args.project,
        since_wall_s=_since(args.since, now_wall_s) if args.since else None,
    )
    if args.alert:
        _alert(report, economics, ledger)
    if args.html:
        _write(args.html, page(report))
    if args.json:
        print(json.dumps(to_json(report), indent=2, allow_nan=False))
    else:
        print(render(report, detailed=args.job is not None, audit=args.audit))
    return 0


def _alert(report: Report, economics: EconomicsSettings, ledger: Ledger) -> None:
    """Write crossed thresholds to the ledger and tell the webhooks, each once."""
    crossed = [(job.facts.summary.job, one) for job in report.jobs for one in job.facts.crossed]
    watch = BudgetWatch(economics.budgets, crossed)
    threads: list[threading.Thread | None] = []
    for job in report.jobs:
        summary = job.facts.summary
        used = amounts(job.time.elapsed_s, job.economics)
        for alert in watch.observe(summary.job, summary.project, used):
            ledger.append(alert.job, alert.event)
            event = alert.event
            print(
                f"alert: job {alert.job} has used {event.used:.4g} {event.metric}, over "
                f"{event.threshold:.0%} of {event.limit:g} (budget {event.budget})",
                file=sys.stderr,
            )
            threads.append(post(alert, _warn, after=threads[-1] if threads else None))
    for thread in filter(None, threads):
        thread.join()
    ledger.close()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _since(text: str, now_wall_s: float) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if match:
        return now_wall_s - float(match[1]) * _UNITS_S[match[2]]
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):  # the year 1 has no time stamp everywhere
        raise ConfigError(
            f"--since {text!r} is neither a date nor a length of time",
            hint="write 2026-01-31, 2026-01-31T12:00, 30m, 12h, 7d or 4w",
        ) from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path} cannot be written: {error}") from error
    print(f"wrote {path}", file=sys.stderr)
