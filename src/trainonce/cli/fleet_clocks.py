"""`trainonce fleet clocks`: offsets and rates of all clocks, from the records of all hosts."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from trainonce.fleet.clocks.record import ClockRecord
from trainonce.fleet.clocks.sync import ClockReport, synchronise

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    records = [ClockRecord.read(path) for path in args.records]
    report = synchronise(records, reference=args.reference, window_s=args.window_s)
    if args.json:
        hosts = {host: dataclasses.asdict(clock) for host, clock in report.clocks.items()}
        record = dataclasses.asdict(report)
        del record["clocks"]
        print(json.dumps(record | {"hosts": hosts}))
    else:
        print(_text(report))
    return 0


def _text(report: ClockReport) -> str:
    lines = [
        (
            f"clocks less that of {report.reference}, {report.num_windows} windows, "
            f"{report.stamps} time stamps"
        ),
        f"{'host':<16} {'offset':>18} {'bound':>12} {'at worst':>12} {'skew':>13}",
    ]
    for host, clock in report.clocks.items():
        lines.append(
            f"{host:<16} {clock.offset_s * 1e6:>15.3f} µs {clock.bound_s * 1e6:>9.3f} µs "
            f"{clock.worst_s * 1e6:>9.3f} µs {clock.skew * 1e6:>9.4f} ppm"
        )
        lines += [
            f"  jumped by {step_s * 1e6:.1f} µs in the window at {when_s:.1f}"
            for when_s, step_s in clock.jumps
        ]
    for alarm in report.asymmetries:
        a, b = (alarm.a, alarm.b) if alarm.longer_s > 0 else (alarm.b, alarm.a)
        lines.append(
            f"asymmetry: {a} to {b} takes {abs(alarm.longer_s) * 1e6:.1f} µs longer than back"
        )
    lines += [f"note: {note}" for note in report.notes]
    lines.append(
        "note: the bound holds where ways there and back are equally long to a tenth; at worst, "
        "however different they are"
    )
    return "\n".join(lines)
