"""`trainonce fleet clock-probe`: one host's part in comparing clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.fleet.clocks.probe import ClockProbeSettings, probe_clocks
from trainonce.fleet.wire import read_token

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Probe, write the record, and say how much came through."""
    peers = tuple(peer.strip() for peer in args.peers.split(",") if peer.strip())
    settings = ClockProbeSettings(
        host=args.host,
        peers=peers,
        token=read_token(args.token_file, [args.host, *peers]),
        port=args.port,
        duration_s=args.duration_s,
        pairs_per_s=args.pairs_per_s,
        wait_s=args.wait_s,
        kernel_stamps=not args.user_stamps,
    )
    record = probe_clocks(settings)
    record.write(args.out)
    probed = len(settings.neighbours())
    heard = probed - len(record.unreachable)
    print(
        f"{args.host}: {sum(map(len, record.sent.values()))} probes to {heard} of {probed} peers, "
        f"{sum(map(len, record.received.values()))} received, {record.stamps} time stamps"
    )
    if record.unreachable:
        print(f"unreachable: {', '.join(record.unreachable)}")
    return 0 if heard else 1
