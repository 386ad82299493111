"""`trainonce run`: train with hot spares; takes torchrun's options."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from trainonce.controller import launch, options
from trainonce.ledger.store import Ledger

if TYPE_CHECKING:
    import argparse

add_arguments = options.add_arguments


def run(args: argparse.Namespace) -> int:
    """Run the job and return its exit code."""
    chosen = options.from_args(args)
    with contextlib.closing(Ledger.open()) as ledger:
        return launch.run_job(chosen, ledger)
