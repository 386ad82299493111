"""`trainonce fleet probe`: one host's part in measuring the fabric."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from trainonce.fleet.links.probe import ProbeSettings, measure
from trainonce.fleet.wire import read_token

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Measure, write the record, and say how much came through."""
    peers = tuple(peer.strip() for peer in args.peers.split(",") if peer.strip())
    chosen = {
        item.name: getattr(args, item.name)
        for item in dataclasses.fields(ProbeSettings)
        if item.name not in ("host", "peers", "token")
    }
    settings = ProbeSettings(host=args.host, peers=peers, **chosen)
    token = read_token(args.token_file, [args.host, *peers])
    record = measure(dataclasses.replace(settings, token=token))
    record.write(args.out)
    paths = sum(hops[-1] == peer for (peer, _), hops in record.hops.items())
    heard = len(peers) - len(record.unreachable)
    print(
        f"{args.host}: {sum(record.sent.values())} probes to {heard} of {len(peers)} peers, "
        f"{paths} paths, {sum(map(len, record.received.values()))} probes received"
    )
    if record.unreachable:
        print(f"unreachable: {', '.join(record.unreachable)}")
    return 0 if heard else 1
