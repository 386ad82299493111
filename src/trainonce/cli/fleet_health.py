"""`trainonce fleet health`: what can be read of this host, and what speaks against it."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.clock import SystemClock
from trainonce.fleet.feed import read_all
from trainonce.fleet.health import Action, judge
from trainonce.fleet.sources.choose import open_sources

if TYPE_CHECKING:
    import argparse

    from trainonce.fleet.signals import Reading

_SHOWN = (
    ("temperature_c", "{:.0f} °C"),
    ("utilisation", "{:.0%} busy"),
    ("memory_free_share", "{:.0%} of memory free"),
    ("disk_free_share", "{:.0%} of disk free"),
)


def run(args: argparse.Namespace) -> int:
    """Read once, and print. Exit code 1 if something asks for a move."""
    words = [word.strip() for word in args.sources.split(",")]
    host = socket.gethostname()
    opened = open_sources(words, host=host, clock=SystemClock(), disk=settings.home())
    readings, missing = read_all(opened)
    opened.close()
    missing = {**opened.missing, **missing}
    devices: dict[str, list[Reading]] = {}
    for reading in readings:
        devices.setdefault(reading.device, []).append(reading)
    verdicts = {device: judge(found) for device, found in devices.items()}
    if args.json:
        print(
            json.dumps(
                {
                    "host": host,
                    "devices": [
                        {
                            "device": device,
                            "action": verdicts[device].action.name.lower(),
                            "reasons": list(verdicts[device].reasons),
                            "readings": [reading.to_record() for reading in found],
                        }
                        for device, found in devices.items()
                    ],
                    "missing": missing,
                },
                indent=2,
            )
        )
    else:
        for device, found in devices.items():
            verdict = verdicts[device]
            shown = [
                text.format(value)
                for name, text in _SHOWN
                for value in [getattr(found[-1], name)]
                if value is not None
            ]
            said = f"{verdict.action.name.lower()}: {'; '.join(verdict.reasons)}"
            judged = "nothing against it" if verdict.action is Action.NONE else said
            print(f"{device or host}: {', '.join([*shown, judged])}")
        for why in missing.values():
            print(f"note: {why}")
    worst = max((verdict.action for verdict in verdicts.values()), default=Action.NONE)
    return 1 if worst is Action.MIGRATE else 0
