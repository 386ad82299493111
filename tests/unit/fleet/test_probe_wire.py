"""Probe packets, settings, and who may send them."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from trainonce.errors import ConfigError
from trainonce.fleet.links.probe import _SO_TIMESTAMPNS, ProbeSettings, measure
from trainonce.fleet.links.record import HostRecord
from trainonce.fleet.links.topology import build_fabric
from trainonce.fleet.prober import Prober
from trainonce.fleet.wire import PACKET_BYTES, Kind, Packet, Sealer, is_loopback, read_token

PACKET = Packet(Kind.PROBE, 3, 17, 123_456_789)
TOKEN = "a secret of the fabric"


def test_packet_survives_the_wire_and_has_a_golden_size() -> None:
    sealer = Sealer(TOKEN)
    data = sealer.pack(PACKET, src="10.0.0.1", dst="10.0.0.2")
    assert len(data) == PACKET_BYTES == 36
    assert sealer.unpack(data, src="10.0.0.1", dst="10.0.0.2") == PACKET


def test_packets_of_strangers_are_not_taken() -> None:
    ours, theirs = Sealer(TOKEN), Sealer("a guess")
    data = ours.pack(PACKET, src="10.0.0.1", dst="10.0.0.2")
    assert theirs.unpack(data, src="10.0.0.1", dst="10.0.0.2") is None
    assert ours.unpack(data, src="10.0.0.3", dst="10.0.0.2") is None, "recorded elsewhere"
    assert ours.unpack(data, src="10.0.0.2", dst="10.0.0.1") is None, "reflected"
    assert ours.unpack(data[:-1], src="10.0.0.1", dst="10.0.0.2") is None
    assert ours.unpack(data + b"x", src="10.0.0.1", dst="10.0.0.2") is None
    assert ours.unpack(b"", src="10.0.0.1", dst="10.0.0.2") is None
    for at in range(len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        assert ours.unpack(bytes(spoilt), src="10.0.0.1", dst="10.0.0.2") is None


def test_token_is_needed_beyond_loopback(tmp_path: Path) -> None:
    assert read_token(None, ["127.0.0.1", "127.0.0.2"]) == ""
    with pytest.raises(ConfigError, match="needs a token"):
        read_token(None, ["127.0.0.1", "10.0.0.1"])
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match="cannot read the token"):
        read_token(path, ["10.0.0.1"])
    path.write_text("short")
    with pytest.raises(ConfigError, match="has 5 characters"):
        read_token(path, ["10.0.0.1"])
    path.write_text(TOKEN + "\n")
    assert read_token(path, ["10.0.0.1"]) == TOKEN


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"host": "gpu-1"}, "not an IPv4 address"),
        ({"peers": ()}, "must be other hosts"),
        ({"peers": ("127.0.0.1",)}, "must be other hosts"),
        ({"peers": ("127.0.0.2", "127.0.0.2")}, "must be other hosts"),
        ({"ports": 0}, "ports must lie"),
        ({"base_port": 80}, "base_port must lie"),
        ({"base_port": 65_535}, "base_port must lie"),
        ({"packets": 10**9}, "packets must lie"),
        ({"rate_per_s": float("nan")}, "rate_per_s must lie"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ProbeSettings(**({"host": "127.0.0.1", "peers": ("127.0.0.2",)} | changes))


def free_ports(count: int) -> int:
    """Return the first of `count` ports that are free on 127.0.0.1 at the moment."""
    for base in range(20_000, 60_000, 97):
        try:
            for port in range(base, base + count):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
                    trial.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


ENDS = ("127.0.0.1", "127.0.0.2")


def both_measure(base: int) -> tuple[list[threading.Thread], dict[str, HostRecord]]:
    """Let two hosts measure each other; their records are there when the threads end."""
    made: dict[str, HostRecord] = {}

    def one(host: str, peer: str) -> None:
        made[host] = measure(
            ProbeSettings(
                host=host, peers=(peer,), ports=2, base_port=base, packets=20, rate_per_s=400,
                wait_s=60,
            )
        )  # fmt: skip

    threads = [threading.Thread(target=one, args=(a, b)) for a, b in (ENDS, ENDS[::-1])]
    for thread in threads:
        thread.start()
    return threads, made


def test_two_hosts_on_loopback_measure_each_other_and_drop_strangers() -> None:
    base = free_ports(2)
    threads, made = both_measure(base)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        while any(thread.is_alive() for thread in threads):
            stranger.sendto(b"hello, let me in please, I am a peer!", (ENDS[0], base))
            threads[0].join(0.02)
    for host, peer in (ENDS, ENDS[::-1]):
        record = made[host]
        assert record.sent == {(peer, 0): 20, (peer, 1): 20}
        assert {key: len(delays) for key, delays in record.received.items()} == record.sent
        assert record.hops == {(peer, 0): [peer], (peer, 1): [peer]}
        assert record.unreachable == []
    assert made[ENDS[0]].strangers > 0
    assert made[ENDS[1]].strangers == 0


def test_kernel_that_refuses_stamps_is_done_without_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing(socket.socket):
        def setsockopt(self, level: int, option: int, *value: Any) -> None:
            if level == socket.SOL_SOCKET and option == _SO_TIMESTAMPNS:
                raise PermissionError(1, "Operation not permitted")
            super().setsockopt(level, option, *value)

    base = free_ports(2)
    monkeypatch.setattr(socket, "socket", Refusing)
    threads, made = both_measure(base)
    for thread in threads:
        thread.join()
    assert {record.stamps for record in made.values()} == {"user"}
    assert [len(rows) for record in made.values() for rows in record.received.values()] == [20] * 4
    [note] = build_fabric(list(made.values())).notes
    assert note.startswith("arrivals were stamped in user space on 127.0.0.")


def test_peer_that_is_not_there_is_reported_and_nothing_hangs() -> None:
    base = free_ports(1)
    record = measure(
        ProbeSettings(host="127.0.0.1", peers=("127.0.0.9",), ports=1, base_port=base, wait_s=0.3)
    )
    assert record.unreachable == ["127.0.0.9"]
    assert (record.sent, record.received) == ({}, {})


def test_address_of_another_host_cannot_be_bound() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        measure(ProbeSettings(host="192.0.2.1", peers=("192.0.2.2",), token=TOKEN))


class Flooded(Prober):
    """A prober whose strangers send faster than it can drop their packets."""

    def __init__(self, settings: ProbeSettings) -> None:
        super().__init__(settings, settings.peers, base_port=settings.base_port, ports=1)
        self.stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.num_sent = 0

    def _fits(self, packet: Packet, port: int) -> bool:
        return False

    def _accept(self, *args: object) -> None:
        super()._accept(*args)  # type: ignore[arg-type]
        self.send()
        assert self.num_sent < 100_000, "the flood is never left"

    def send(self) -> None:
        self.num_sent += 1
        self.stranger.sendto(b"x", (self._host, self._base_port))

    def wait(self) -> None:
        self._receive_for(0.01)


def test_flood_of_strangers_holds_up_nobody() -> None:
    settings = ProbeSettings(host="127.0.0.1", peers=("127.0.0.2",), base_port=47_655)
    with Flooded(settings) as prober:
        prober.send()
        prober.wait()
        assert prober.num_sent > 1
    prober.stranger.close()


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
        ("127.example.org", False), ("10.0.0.1", False), ("0.0.0.0", False), ("", False),
    ],
)  # fmt: skip
def test_only_what_is_surely_this_machine_is_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) is own
