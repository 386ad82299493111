"""`trainonce run`: train with hot spares; takes torchrun's options."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING

from trainonce.controller import arguments, launch
from trainonce.errors import ConfigError, LedgerError
from trainonce.events import BudgetCrossed
from trainonce.ledger.store import Ledger

if TYPE_CHECKING:
    import argparse

    from trainonce.controller.options import RunOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the launcher's options, and what comes before the start."""
    arguments.add_arguments(parser)
    parser.add_argument(
        "--smoke", action="store_true", help="two batches on the CPU first; start only if they work"
    )
    parser.add_argument(
        "--smoke-epoch", action="store_true", help="the whole first epoch on the CPU first"
    )


def run(args: argparse.Namespace) -> int:
    """Run the job and return its exit code."""
    chosen = arguments.from_args(args)
    if args.smoke or args.smoke_epoch:
        _smoke(chosen, epoch=args.smoke_epoch)
    with contextlib.closing(Ledger.open(on_error=_say)) as ledger:
        crossed: list[BudgetCrossed] = []
        if chosen.job and chosen.economics.budgets:
            # An id that ran before: what was told then is not told again.
            with contextlib.suppress(LedgerError):
                found = ledger.events(chosen.job, BudgetCrossed.kind)
                crossed = [event for event in found if isinstance(event, BudgetCrossed)]
        return launch.run_job(chosen, ledger, crossed=crossed)


def _smoke(chosen: RunOptions, *, epoch: bool) -> None:
    """Run two batches of the script on the CPU, or an epoch, in a process of its own.

    Raises:
        SmokeTestError: They do not work; nothing was started.
    """
    from trainonce.levers.smoke import smoke_test  # torch, which the launcher does without

    if chosen.module or chosen.no_python:
        raise ConfigError(
            "--smoke takes a script, and neither a module nor a program",
            hint="leave --smoke out, or name the script's file",
        )
    limit_s = None if epoch else 600.0
    found = smoke_test(chosen.script, chosen.script_args, epoch=epoch, timeout_s=limit_s)
    _say(
        f"smoke test passed: {found.num_steps} updates, inputs {json.dumps(found.inputs[-1:])},"
        f" {found.num_parameters:,} parameters, state {found.state_bytes / 2**20:.1f} MiB"
    )


def _say(text: str) -> None:
    print(f"trainonce: {text}", file=sys.stderr, flush=True)
