"""`trainonce migrate`: move a rank to a spare while the job trains."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from trainonce.controller import control_socket

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("job", help="id of the job, as `trainonce ps` shows it")
    parser.add_argument("--rank", type=int, required=True, help="the rank to move")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Ask for the move, wait until training goes on, and tell what it cost."""
    answer = control_socket.request(args.job, op="migrate", rank=args.rank)
    if args.json:
        print(json.dumps(answer))
    elif answer["ok"]:
        print(answer["text"])
    else:
        print(f"error: {answer['text']}", file=sys.stderr)
    return 0 if answer["ok"] else 1
