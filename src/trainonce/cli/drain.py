"""`trainonce drain`: empty a host, or one device of it, while the jobs on it train."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from trainonce.controller import control_socket
from trainonce.errors import JobNotFoundError, WireError

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("host", help="the host to empty, as `hostname` calls it")
    parser.add_argument(
        "--device", default="", help="only this device: gpu1; slot1 where there are none"
    )
    parser.add_argument("--job", default="", help="only this job; all of yours by default")
    parser.add_argument(
        "--checkpoint", action="store_true",
        help="write a checkpoint and end the jobs: where there is no other host to move to",
    )  # fmt: skip
    parser.add_argument(
        "--undo", action="store_true", help="the jobs may use it again: maintenance is over"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")


def run(args: argparse.Namespace) -> int:
    """Ask each job to leave, wait until it has, and tell what came of it."""
    jobs = [args.job] if args.job else control_socket.running_jobs()
    answers: list[dict[str, object]] = []
    for job in jobs:
        try:
            answer = control_socket.request(
                job, op="drain", host=args.host, device=args.device, checkpoint=args.checkpoint,
                undo=args.undo,
            )  # fmt: skip
        except (JobNotFoundError, WireError) as error:
            if args.job:
                raise
            answer = {"ok": True, "text": f"job {job} has ended meanwhile: {error.message}"}
        answers.append({"job": job, **answer})
    if args.json:
        print(json.dumps(answers))
    elif not answers:
        print("no job is running")
    else:
        for answer in answers:
            print(answer["text"] if answer["ok"] else f"error: {answer['text']}",
                  file=sys.stdout if answer["ok"] else sys.stderr)  # fmt: skip
    return 0 if all(answer["ok"] for answer in answers) else 1
