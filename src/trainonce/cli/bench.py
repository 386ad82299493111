"""`trainonce bench levers`: what levers save at equal quality, measured on this machine."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError, StudyPausedError

if TYPE_CHECKING:
    import argparse

_EXIT_PAUSED = 75  # as sysexits' EX_TEMPFAIL: call again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("what", choices=["levers"], help="what to measure")
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME",
        help="digits, bytes, finetune, cartpole or acrobot; again for more (all)",
    )
    parser.add_argument("--grid", default="full", help="recipes to choose from: small or full")
    parser.add_argument("--size", default="medium", help="of the model: small, medium or large")
    parser.add_argument("--seeds", type=int, default=5, help="reporting seeds, at least 5")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="first reporting seed; the others follow it"
    )
    parser.add_argument(
        "--first-tuning-seed", type=int, metavar="SEED", help="the others follow it (last + 101)"
    )
    parser.add_argument("--tuning-seeds", type=int, default=3, help="seeds for choices (3)")
    parser.add_argument("--split-seed", type=int, default=0, help="which data are held out")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (1)")
    parser.add_argument("--hardware", metavar="NAME", help="for the file's name (4-core-cpu)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write result files and plots there"
    )
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="keep finished runs there, and go on from it"
    )
    parser.add_argument(
        "--pause-after-s",
        type=float,
        metavar="S",
        help="start no further run after S seconds (exit code 75); --journal goes on",
    )
    parser.add_argument(
        "--repeat", type=Path, metavar="FILE", help="measure again what a result file holds"
    )
    parser.add_argument(
        "--show",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="print the tables of result files, and one of all; run nothing",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, or show what was measured."""
    from trainonce.levers import results

    if args.show:
        _print([results.read(path) for path in args.show], args)
        return 0
    options = dict(results.read(args.repeat)["options"]) if args.repeat else _options(args)
    limit_s = math.inf if args.pause_after_s is None else args.pause_after_s
    pause_at_s = time.monotonic() + limit_s
    try:
        records = [_measure(task, options, args, pause_at_s) for task in options["task"]]
    except StudyPausedError as paused:
        _progress(f"{paused.message}; {paused.hint}")
        return _EXIT_PAUSED
    _print(records, args)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    from trainonce.levers.bench import TASKS

    names = ("grid", "size", "seeds", "first_seed", "tuning_seeds", "split_seed", "threads")
    options = {name: getattr(args, name) for name in names}
    after = args.first_seed + args.seeds
    first = args.first_tuning_seed
    options["first_tuning_seed"] = after + 100 if first is None else first
    if args.tuning_seeds < 1 or args.threads < 1:
        raise ConfigError("--tuning-seeds and --threads must be at least 1")
    if args.pause_after_s is not None and args.journal is None:
        raise ConfigError(
            "--pause-after-s without --journal would forget what is finished",
            hint="name a file with --journal",
        )
    return {"task": args.task or list(TASKS), **options}


def _measure(
    task: str, options: dict[str, Any], args: argparse.Namespace, pause_at_s: float
) -> dict[str, Any]:
    import torch

    from trainonce.ledger.energy import open_meter
    from trainonce.levers import results, tables
    from trainonce.levers.bench import make_study
    from trainonce.levers.harness import run_study
    from trainonce.levers.journal import Journal

    torch.set_num_threads(options["threads"])
    first = options["first_seed"]
    after = first + options["seeds"]
    tuning = options.get("first_tuning_seed", after + 100)
    study = make_study(
        task,
        grid=options["grid"],
        size=options.get("size", "medium"),
        split_seed=options["split_seed"],
        tuning_seeds=range(tuning, tuning + options["tuning_seeds"]),
        reporting_seeds=range(first, after),
    )
    result = run_study(
        study,
        energy=open_meter(),
        progress=_progress,
        journal=Journal(args.journal) if args.journal else None,
        pause=lambda: time.monotonic() >= pause_at_s,
    )
    record = results.to_record(result, {**options, "task": [task]})
    if args.out:
        hardware = args.hardware or f"{record['environment']['num_cpus']}-core-cpu"
        path = results.write(record, args.out, hardware)
        try:
            tables.plot(record, path.with_suffix(".png"))
        except ImportError:
            _progress("no plot: matplotlib is not installed (pip install 'trainonce[plot]')")
        _progress(f"wrote {path}")
    return record


def _print(records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from trainonce.levers import tables

    if args.json:
        print(json.dumps(records))
    else:
        if len(records) > 1:
            print(f"### All\n\n{tables.summary_table(records)}\n")
        print("\n".join(tables.page(record) for record in records))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
