"""`trainonce fleet agent`: report this host's health to a collector."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.clock import SystemClock
from trainonce.controller import control_socket
from trainonce.errors import ConfigError, JobNotFoundError, WireError
from trainonce.fleet.collect.agent import Reporter, Sender
from trainonce.fleet.collect.agent import run as run_agent
from trainonce.fleet.collect.message import JobStatus
from trainonce.fleet.sources.choose import open_sources
from trainonce.fleet.wire import read_token

if TYPE_CHECKING:
    import argparse

_STATUS_S = 2.0


def run(args: argparse.Namespace) -> int:
    """Report until it is told to end."""
    if not 0.1 <= args.every_s <= 3600:
        raise ConfigError(f"--every-s is {args.every_s}", hint="give 0.1 to 3600 seconds")
    token = read_token(args.token_file, []) if args.token_file else ""
    sender = Sender(args.collector, token=token, ca=args.tls_ca)
    words = [word.strip() for word in args.sources.split(",")]
    clock = SystemClock()
    opened = open_sources(words, host=args.host, clock=clock, disk=settings.home())
    for why in opened.missing.values():
        _say(f"note: {why}")
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    _say(f"reporting {args.host} to {args.collector} every {args.every_s:g} s")
    reporter = Reporter(args.host, opened, _jobs, clock)
    run_agent(reporter, sender, every_s=args.every_s, wait=stop.wait, say=_say)
    return 0


def _jobs() -> list[JobStatus]:
    """Return the jobs of this user on this host; one that does not answer is left out."""
    found: list[JobStatus] = []
    for job in control_socket.running_jobs():
        try:
            status = control_socket.request(job, op="status", timeout_s=_STATUS_S)
            workers = status["workers"]
            found.append(
                JobStatus(
                    job=job,
                    step=int(status["step"]),
                    ranks=sum(worker["rank"] is not None for worker in workers),
                    spares_ready=sum(bool(worker["parked"]) for worker in workers),
                    incidents=int(status["incidents"]),
                )
            )
        except (JobNotFoundError, WireError, OSError, KeyError, TypeError, ValueError):
            continue
    return found


def _say(text: str) -> None:
    print(f"trainonce: {text}", file=sys.stderr, flush=True)
