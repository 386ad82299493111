"""`trainonce fleet`: what the hosts of a cluster see of its network and clocks."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.fleet.clocks.probe import ClockProbeSettings
from trainonce.fleet.links.probe import ProbeSettings
from trainonce.fleet.sources.words import HINT

if TYPE_CHECKING:
    import argparse

# What -> (module that does it, one line of help). A module offers `run(args) -> int`; it is
# imported only when it is called, since probing should not wait for scipy to load.
_PARTS = {
    "health": ("trainonce.cli.fleet_health", "what can be read of this host, and its verdicts"),
    "agent": ("trainonce.cli.fleet_agent", "report this host's health to a collector"),
    "collector": ("trainonce.cli.fleet_collector", "take reports, and show them to Prometheus"),
    "probe": ("trainonce.cli.fleet_probe", "measure paths and loss, together with the other hosts"),
    "links": ("trainonce.cli.fleet_links", "name the faulty links and switches"),
    "clock-probe": ("trainonce.cli.fleet_clock_probe", "probe clocks, with the other hosts"),
    "clocks": ("trainonce.cli.fleet_clocks", "compare the clocks of all hosts"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parts = parser.add_subparsers(dest="fleet_part", metavar="WHAT", required=True)
    declare = {
        "health": _add_health,
        "agent": _add_agent,
        "collector": _add_collector,
        "probe": _add_probe,
        "links": _add_links,
        "clock-probe": _add_clock_probe,
        "clocks": _add_clocks,
    }
    for name, (_, summary) in _PARTS.items():
        declare[name](parts.add_parser(name, help=summary, description=summary))


def run(args: argparse.Namespace) -> int:
    """Run the chosen part."""
    return importlib.import_module(_PARTS[args.fleet_part][0]).run(args)


_Options = tuple[tuple[str, Callable[[str], Any], str], ...]

_PROBE: _Options = (
    ("ports", int, "flows to each peer"),
    ("base_port", int, "first of the ports, the same on all hosts"),
    ("packets", int, "probes on each flow"),
    ("rate_per_s", float, "packets sent a second, at most"),
    ("max_ttl", int, "longest path, in hops"),
    ("wait_s", float, "how long peers are waited for, seconds"),
)
_CLOCK_PROBE: _Options = (
    ("port", int, "the same on all hosts"),
    ("duration_s", float, "how long to probe, seconds"),
    ("pairs_per_s", float, "probe pairs to each peer a second, at most"),
    ("wait_s", float, "how long peers are waited for, seconds"),
)


def _add_health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sources", default="auto", help=HINT)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("collector", metavar="URL", help="such as https://collector:9420")
    parser.add_argument("--host", default=socket.gethostname(), help="this host's name")
    parser.add_argument("--sources", default="auto", help=HINT)
    parser.add_argument("--every-s", type=float, default=10.0, help="between two reports (10)")
    parser.add_argument("--token-file", type=Path, help="the collector's token; not on loopback")
    parser.add_argument("--tls-ca", type=Path, help="certificate of a collector that made its own")


def _add_collector(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=9420, help="0 takes a free one (9420)")
    parser.add_argument("--token-file", type=Path, help="token to ask for; needed beyond loopback")
    parser.add_argument("--tls-cert", type=Path, help="certificate, for HTTPS")
    parser.add_argument("--tls-key", type=Path, help="its key")
    parser.add_argument(
        "--stale-s", type=float, default=60.0, help="a host that is silent for so long is down (60)"
    )


def _add_probe(parser: argparse.ArgumentParser) -> None:
    _add_measuring(parser, ProbeSettings, _PROBE)


def _add_clock_probe(parser: argparse.ArgumentParser) -> None:
    _add_measuring(parser, ClockProbeSettings, _CLOCK_PROBE)
    parser.add_argument(
        "--user-stamps", action="store_true", help="take stamps in user space, not in the kernel"
    )


def _add_measuring(parser: argparse.ArgumentParser, settings: type, options: _Options) -> None:
    parser.add_argument("--host", required=True, help="this host's IPv4 address")
    parser.add_argument("--peers", required=True, help="the other hosts' addresses, with commas")
    parser.add_argument("--out", type=Path, required=True, help="file for what was measured")
    parser.add_argument("--token-file", type=Path, help="secret all hosts share; not on loopback")
    for name, kind, text in options:
        default = getattr(settings, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=default, help=f"{text} ({default:g})")


def _add_clocks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=Path, nargs="+", help="files of `fleet clock-probe`")
    parser.add_argument("--reference", metavar="HOST", help="compare with this host's clock")
    parser.add_argument(
        "--window-s", type=float, default=2.0, help="how long a rate is constant, seconds (2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=Path, nargs="+", help="files of `trainonce fleet probe`")
    parser.add_argument(
        "--names", type=Path, help='TOML that names devices: "10.0.0.1" = "leaf1", once an address'
    )
    parser.add_argument("--clocks", type=Path, help="JSON of `trainonce fleet clocks --json`")
    parser.add_argument(
        "--min-late-us", type=float, default=20.0, help="a packet this late is late (20)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw to a .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print JSON")
