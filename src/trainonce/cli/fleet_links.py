"""`trainonce fleet links`: the faulty links and switches, from the records of all hosts."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.fleet.links.delay import ClockOffset, DelayEvidence, observe_delay
from trainonce.fleet.links.draw import draw_topology
from trainonce.fleet.links.locate import Finding, locate
from trainonce.fleet.links.record import HostRecord
from trainonce.fleet.links.topology import Fabric, build_fabric
from trainonce.fleet.records import finite

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Locate, draw and print."""
    if not args.min_late_us > 0:
        raise ConfigError(f"--min-late-us must be more than 0, not {args.min_late_us}")
    names = _read_names(args.names) if args.names else {}
    fabric = build_fabric([HostRecord.read(path) for path in args.records], names)
    lossy = locate(fabric.loss())
    offsets = _read_offsets(args.clocks, names) if args.clocks else None
    delay = observe_delay(fabric, offsets, min_late_s=args.min_late_us / 1e6)
    slow = locate(delay.observed, min_bad_rate=0.05) if delay else []
    if args.plot:
        links = sorted({name for flow in fabric.flows for name in flow.links()})
        draw_topology(links, fabric.hosts, [*lossy, *slow], args.plot)
    if args.json:
        print(json.dumps(_record(fabric, lossy, delay, slow)))
    else:
        print(_text(fabric, lossy, delay, slow))
    return 0


def _record(
    fabric: Fabric, lossy: list[Finding], delay: DelayEvidence | None, slow: list[Finding]
) -> dict[str, Any]:
    return {
        "hosts": fabric.hosts,
        "devices": fabric.devices(),
        "flows": len(fabric.flows),
        "lossy": [dataclasses.asdict(finding) for finding in lossy],
        "slow": [dataclasses.asdict(finding) for finding in slow],
        "delay": delay
        and {"directed": delay.directed, "late_s": delay.late_s, "reason": delay.reason},
        "notes": fabric.notes,
    }


def _text(
    fabric: Fabric, lossy: list[Finding], delay: DelayEvidence | None, slow: list[Finding]
) -> str:
    sent = sum(flow.sent for flow in fabric.flows)
    lost = sum(flow.lost for flow in fabric.flows)
    lines = [
        (
            f"{len(fabric.flows)} flows between {len(fabric.hosts)} hosts over "
            f"{len(fabric.devices()) - len(fabric.hosts)} switches; {lost} of {sent} probes lost"
        )
    ]
    lines += [_line(finding, "lost") for finding in lossy] or ["no lossy link or switch"]
    if delay:
        kind = "links have a direction" if delay.directed else "links have no direction here"
        lines.append(f"late by {delay.late_s * 1e6:.0f} µs or more ({kind}: {delay.reason})")
        lines += [_line(finding, "late") for finding in slow] or ["no slow link or switch"]
    lines += [f"note: {note}" for note in fabric.notes]
    lines.append("note: probes take their own ECMP paths, not those of the job's traffic")
    return "\n".join(lines)


def _line(finding: Finding, what: str) -> str:
    rivals = f"; cannot be told from {', '.join(finding.rivals)}" if finding.rivals else ""
    return (
        f"{finding.kind} {finding.component}: {finding.share_bad:.2%} {what} "
        f"({finding.bad} of {finding.sent} on {finding.flows} flows, elsewhere "
        f"{finding.background:.2%}), confidence {finding.confidence:.2f}{rivals}"
    )


def _read_names(path: Path) -> dict[str, str]:
    try:
        names = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read names from {path}: {error}") from error
    for address, name in names.items():
        if not isinstance(name, str) or "->" in name or "--" in name:
            raise ConfigError(
                f"{path}: {address!r} cannot be called {name!r}",
                hint='one line an address: "10.0.0.1" = "leaf1"',
            )
    return names


def _read_offsets(path: Path, names: dict[str, str]) -> dict[str, ClockOffset]:
    try:
        hosts = json.loads(path.read_text(encoding="utf-8"))["hosts"]
        return {
            names.get(str(host), str(host)): ClockOffset(
                offset_s=finite(each["offset_s"]),
                bound_s=finite(each["bound_s"]),
                skew=finite(each["skew"]),
                at_s=finite(each["at_s"]),
            )
            for host, each in hosts.items()
        }
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not hold clock offsets: {error}",
            hint="it is written by `trainonce fleet clocks --json`",
        ) from error
