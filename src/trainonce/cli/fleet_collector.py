"""`trainonce fleet collector`: take the reports of all hosts, and show them to Prometheus."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING

from trainonce.clock import SystemClock
from trainonce.errors import ConfigError
from trainonce.fleet.collect.book import Book
from trainonce.fleet.collect.collector import Collector
from trainonce.fleet.wire import read_token

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Serve until it is told to end."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together", hint="give both or neither")
    if not 1 <= args.stale_s <= 86_400:
        raise ConfigError(f"--stale-s is {args.stale_s}", hint="give 1 to 86400 seconds")
    token = read_token(args.token_file, []) if args.token_file else ""
    tls = (args.tls_cert, args.tls_key) if args.tls_cert is not None else None
    book = Book(SystemClock(), stale_s=args.stale_s)
    with Collector((args.listen, args.port), book, token=token, tls=tls) as collector:
        # `shutdown` waits for the loop, which runs on this very thread: ask from another.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(
                signum, lambda *_: threading.Thread(target=collector.shutdown, daemon=True).start()
            )
        url = f"{'https' if tls else 'http'}://{args.listen}:{collector.port}"
        print(
            f"trainonce: collecting on {url}, metrics on {url}/metrics",
            file=sys.stderr,
            flush=True,
        )
        collector.serve_forever(poll_interval=0.2)
    return 0
