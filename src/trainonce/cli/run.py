"""`trainonce run`: train with hot spares; takes torchrun's options."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from trainonce.controller import launch, options
from trainonce.errors import LedgerError
from trainonce.events import BudgetCrossed
from trainonce.ledger.store import Ledger

if TYPE_CHECKING:
    import argparse

add_arguments = options.add_arguments


def run(args: argparse.Namespace) -> int:
    """Run the job and return its exit code."""
    chosen = options.from_args(args)
    with contextlib.closing(Ledger.open()) as ledger:
        crossed: list[BudgetCrossed] = []
        if chosen.job and chosen.economics.budgets:
            # An id that ran before: what was told then is not told again.
            with contextlib.suppress(LedgerError):
                found = ledger.events(chosen.job, BudgetCrossed.kind)
                crossed = [event for event in found if isinstance(event, BudgetCrossed)]
        return launch.run_job(chosen, ledger, crossed=crossed)
