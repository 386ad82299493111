"""`trainonce run`: train with hot spares; takes torchrun's options."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.controller import launch, options
from trainonce.errors import ConfigError
from trainonce.ledger import prices
from trainonce.ledger.spending import Action, Budget, BudgetGate, SpendingMeter, open_spending
from trainonce.ledger.store import Ledger

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator

    from trainonce.controller.options import RunOptions

_LOOK_EVERY_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the launcher's options, and those for before the start and for the end."""
    options.add_arguments(parser)
    parser.add_argument(
        "--smoke", action="store_true", help="two batches on the CPU first; start only if they work"
    )
    for name, unit in (("cost-usd", "USD"), ("kwh", "kWh"), ("hours", "hours by the clock")):
        parser.add_argument(
            f"--max-{name}", type=float, metavar="X", help=f"{unit}; then a clean, resumable stop"
        )


def run(args: argparse.Namespace) -> int:
    """Run the job and return its exit code."""
    chosen = options.from_args(args)
    budget = Budget(max_cost_usd=args.max_cost_usd, max_kwh=args.max_kwh, max_hours=args.max_hours)
    economics = prices.load(settings.home()).prices
    meter, gate = open_spending(budget, chosen.nproc + chosen.spares, economics)
    if args.smoke:
        _smoke(chosen)
    with contextlib.closing(Ledger.open()) as ledger, _within(meter, gate, chosen.signals[0]):
        return launch.run_job(chosen, ledger)


def _smoke(chosen: RunOptions) -> None:
    """Run two batches of the script on the CPU, in a process of its own.

    Raises:
        SmokeTestError: They do not work; nothing was started.
    """
    from trainonce.levers.smoke import smoke_test  # torch, which the launcher does without

    if chosen.module or chosen.no_python:
        raise ConfigError(
            "--smoke takes a script, and neither a module nor a program",
            hint="leave --smoke out, or name the script's file",
        )
    found = smoke_test(chosen.script, chosen.script_args)
    _say(
        f"smoke test passed: {found.num_steps} updates, inputs {json.dumps(found.inputs[-1:])}, "
        f"{found.num_parameters:,} parameters, state {found.state_bytes / 2**20:.1f} MiB"
    )


@contextlib.contextmanager
def _within(meter: SpendingMeter, gate: BudgetGate, stop_signal: int) -> Generator[None]:
    """Watch the budget while the job runs: warn once, then end it as `stop_signal` would."""
    if not gate.has_limits:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_EVERY_S):
            decision = gate.decide(meter.used())
            if decision.action is Action.WARN:
                _say(f"budget: {decision.reason}")
            elif decision.action is Action.STOP:
                _say(f"the budget is spent: {decision.reason}; ending at the next commit. "
                     "--resume goes on from there")  # fmt: skip
                os.kill(os.getpid(), stop_signal)
                return

    thread = threading.Thread(target=watch, name="trainonce-budget", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(line: str) -> None:
    print(f"trainonce: {line}", file=sys.stderr, flush=True)
