"""Two hosts on loopback compare their clocks, which are one."""

import socket
import threading

import pytest

from trainonce.fleet.clocks.probe import ClockProbeSettings, probe_clocks
from trainonce.fleet.clocks.sync import synchronise

ENDS = ("127.0.0.1", "127.0.0.2")


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        trial.bind((ENDS[0], 0))
        return trial.getsockname()[1]


@pytest.mark.parametrize("kernel_stamps", [True, False])
def test_two_hosts_on_loopback_agree_and_strangers_are_dropped(kernel_stamps: bool) -> None:
    port = free_port()
    made = {}

    def one(host: str, peer: str) -> None:
        made[host] = probe_clocks(
            ClockProbeSettings(
                host=host, peers=(peer,), port=port, duration_s=1.5, pairs_per_s=100,
                wait_s=60, kernel_stamps=kernel_stamps,
            )
        )  # fmt: skip

    threads = [threading.Thread(target=one, args=(a, b)) for a, b in (ENDS, ENDS[::-1])]
    for thread in threads:
        thread.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        while any(thread.is_alive() for thread in threads):
            stranger.sendto(b"what time is it?", (ENDS[0], port))
            threads[0].join(0.02)
    if not kernel_stamps:
        assert {record.stamps for record in made.values()} == {"user"}
    assert made[ENDS[0]].strangers > 0
    assert made[ENDS[1]].strangers == 0
    report = synchronise(list(made.values()), window_s=1.0)
    found = report.clocks[ENDS[1]]
    assert abs(found.offset_s) <= found.worst_s, "it is one clock"


def test_peer_that_is_not_there_is_reported_and_nothing_hangs() -> None:
    record = probe_clocks(
        ClockProbeSettings(
            host=ENDS[0], peers=("127.0.0.9",), port=free_port(), duration_s=0.2, wait_s=0.2
        )
    )
    assert record.unreachable == ["127.0.0.9"]
    assert record.sent == {}
