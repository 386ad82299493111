"""Paths to devices and links; delays with and without clocks."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from trainonce.cli.main import main
from trainonce.errors import ConfigError
from trainonce.fleet.links.delay import ClockOffset, observe_delay
from trainonce.fleet.links.locate import locate
from trainonce.fleet.links.record import HostRecord
from trainonce.fleet.links.topology import build_fabric, link_ends, link_name
from trainonce.fleet.records import read_record

PORTS = range(8)
HOSTS = {h: f"10.1.{h}.2" for h in range(1, 7)}
LEAF_OF = {h: (h + 1) // 2 for h in HOSTS}
NAMES = {
    **{address: f"host{h}" for h, address in HOSTS.items()},
    **{f"10.1.{h}.1": f"leaf{LEAF_OF[h]}" for h in HOSTS},
    **{f"10.2.{leaf * 10 + s}.1": f"leaf{leaf}" for leaf in (1, 2, 3) for s in (1, 2)},
    **{f"10.2.{leaf * 10 + s}.2": f"spine{s}" for leaf in (1, 2, 3) for s in (1, 2)},
}


def hops(a: int, b: int, port: int) -> list[str | None]:
    """Addresses at which routers of a two-spine Clos take the packets of one flow in."""
    if LEAF_OF[a] == LEAF_OF[b]:
        return [f"10.1.{a}.1", HOSTS[b]]
    spine = 1 + (a * 7 + b * 3 + port) % 2
    return [
        f"10.1.{a}.1",
        f"10.2.{LEAF_OF[a] * 10 + spine}.2",
        f"10.2.{LEAF_OF[b] * 10 + spine}.1",
        HOSTS[b],
    ]


def links_of(a: int, b: int, port: int) -> list[str]:
    devices = [f"host{a}", *(NAMES[str(hop)] for hop in hops(a, b, port))]
    return [link_name(x, y, directed=True) for x, y in itertools.pairwise(devices)]


def records(
    *,
    slow: str = "",
    lossy: str = "",
    dead: str = "",
    clock_s: dict[int, float] | None = None,
    seed: int = 0,
) -> list[HostRecord]:
    """Measure a simulated Clos; `slow` adds 100 µs on a link, `lossy` loses 2 %, `dead` all."""
    rng = np.random.default_rng(seed)
    made = {h: HostRecord(host=address, stamps="kernel") for h, address in HOSTS.items()}
    for a in HOSTS:
        for b in HOSTS:
            for port in PORTS if a != b else ():
                way, links = hops(a, b, port), links_of(a, b, port)
                delay_s = 2e-6 * len(links) + rng.exponential(2e-6, 100)
                delay_s += 100e-6 * (slow in links)
                arrived = rng.random(100) >= 0.02 * (lossy in links) + (dead in links)
                if dead in links:
                    way = way[: links.index(dead)]
                elif dead in links_of(b, a, port):  # the answer is lost
                    way = way[:-1]
                if clock_s:
                    delay_s += clock_s[b] - clock_s[a]
                made[a].hops[HOSTS[b], port] = way
                made[a].sent[HOSTS[b], port] = 100
                delays_ns = np.rint(delay_s[arrived] * 1e9).astype(int).tolist()
                made[b].received[HOSTS[a], port] = [
                    (1_000_000 + i, d) for i, d in enumerate(delays_ns)
                ]
    return list(made.values())


def test_interfaces_of_one_router_are_found_without_names() -> None:
    fabric = build_fabric(records())
    assert fabric.hosts == sorted(HOSTS.values())
    assert len(fabric.devices()) == 6 + 5
    links = {name for flow in fabric.flows for name in flow.links()}
    assert len(links) == 2 * (6 + 6)


def readdressed(made: list[HostRecord]) -> list[HostRecord]:
    """Return the records with every cable in a /31 of its own, one next to the other."""
    cables = sorted({address.rpartition(".")[0] for address in NAMES})

    def other(address: str | None) -> str | None:
        if address is None:
            return None
        cable, _, end = address.rpartition(".")
        number = 2 * cables.index(cable) + int(end) - 1
        return f"10.9.{number // 256}.{number % 256}"

    for record in made:
        record.host = str(other(record.host))
        record.hops = {
            (str(other(peer)), port): [other(hop) for hop in way]
            for (peer, port), way in record.hops.items()
        }
        record.sent = {(str(other(peer)), port): n for (peer, port), n in record.sent.items()}
        record.received = {(str(other(p)), port): r for (p, port), r in record.received.items()}
    return made


def test_interfaces_are_found_in_networks_of_two_addresses_that_follow_each_other() -> None:
    fabric = build_fabric(readdressed(records()))
    assert len(fabric.devices()) == 6 + 5
    assert len({name for flow in fabric.flows for name in flow.links()}) == 2 * (6 + 6)


def test_name_of_one_interface_holds_for_the_whole_router() -> None:
    for address in ("10.2.11.2", "10.2.21.2", "10.2.31.2"):  # of spine1
        fabric = build_fabric(records(), {address: "spine1"})
        assert len(fabric.devices()) == 6 + 5
        assert "spine1" in fabric.devices()


def test_given_names_are_used() -> None:
    fabric = build_fabric(records(), NAMES)
    assert set(fabric.devices()) == set(NAMES.values())


def test_addresses_of_hosts_are_never_joined() -> None:
    a, b = HostRecord(host="10.0.0.1"), HostRecord(host="10.0.0.2")
    a.hops["10.0.0.2", 0], b.hops["10.0.0.1", 0] = ["10.0.0.2"], ["10.0.0.1"]
    a.sent["10.0.0.2", 0] = b.sent["10.0.0.1", 0] = 5
    fabric = build_fabric([a, b])
    assert fabric.devices() == ["10.0.0.1", "10.0.0.2"]


def test_silent_routers_become_one_unknown_device_between_their_neighbours() -> None:
    made = records()
    for record in made:
        for key, way in record.hops.items():
            if len(way) == 4:
                record.hops[key] = [way[0], None, way[2], way[3]]
    fabric = build_fabric(made, NAMES)
    unknown = [device for device in fabric.devices() if device.startswith("?")]
    assert len(unknown) == 3 * 2
    assert "?(leaf1,leaf2)" in unknown


@pytest.mark.parametrize("lossy", ["leaf1->spine2", "host3->leaf2", "spine1->leaf3"])
def test_lossy_link_is_named_with_its_direction(lossy: str) -> None:
    fabric = build_fabric(records(lossy=lossy), NAMES)
    assert [finding.component for finding in locate(fabric.loss())] == [lossy]


@pytest.mark.parametrize("dead", ["leaf1->spine2", "spine1->leaf3", "spine2->leaf1"])
def test_link_that_lets_nothing_through_is_named_though_no_trace_passes_it(dead: str) -> None:
    fabric = build_fabric(records(dead=dead), NAMES)
    assert [finding.component for finding in locate(fabric.loss())] == [dead]
    assert any("known up to the last router that answered" in note for note in fabric.notes)
    assert not any(device.startswith("?(host") for device in fabric.devices())


def test_dead_uplinks_that_cannot_be_told_apart_are_named_by_where_they_begin() -> None:
    made = records(dead="leaf1->spine2")
    for record in made[:2]:  # leaf1 was not seen to send anything to spine1 either
        for key, way in record.hops.items():
            record.hops[key] = way[:1] if len(way) > 2 else way
    [finding] = locate(build_fabric(made, NAMES).loss())
    assert finding.component.startswith("leaf1->?(leaf1)")


def test_good_clocks_tell_the_direction_of_a_slow_link() -> None:
    rng = np.random.default_rng(4)
    clock_s = {h: float(rng.uniform(-5e-3, 5e-3)) for h in HOSTS}
    made = records(slow="spine2->leaf1", clock_s=clock_s)
    offsets = {f"host{h}": ClockOffset(offset_s=s, bound_s=1e-7) for h, s in clock_s.items()}
    evidence = observe_delay(build_fabric(made, NAMES), offsets)
    assert evidence is not None
    assert evidence.directed
    found = locate(evidence.observed, min_bad_rate=0.05)
    assert [finding.component for finding in found] == ["spine2->leaf1"]


@pytest.mark.parametrize(
    ("bound_s", "says"), [(None, "no clock offsets"), (1e-4, "clocks may be off by 100 µs")]
)
def test_poor_clocks_leave_the_link_without_direction_and_say_so(
    bound_s: float | None, says: str
) -> None:
    rng = np.random.default_rng(4)
    clock_s = {h: float(rng.uniform(-5e-3, 5e-3)) for h in HOSTS}
    made = records(slow="spine2->leaf1", clock_s=clock_s)
    offsets = (
        None
        if bound_s is None
        else {f"host{h}": ClockOffset(offset_s=0.0, bound_s=bound_s) for h in HOSTS}
    )
    evidence = observe_delay(build_fabric(made, NAMES), offsets)
    assert evidence is not None
    assert not evidence.directed
    assert says in evidence.reason
    found = locate(evidence.observed, min_bad_rate=0.05)
    assert [finding.component for finding in found] == ["leaf1--spine2"]


def test_healthy_delays_name_nothing() -> None:
    for seed in range(5):
        evidence = observe_delay(build_fabric(records(seed=seed), NAMES))
        assert evidence is not None
        assert locate(evidence.observed, min_bad_rate=0.05) == []


def test_record_survives_its_file(tmp_path: Path) -> None:
    [first, *_] = records()
    first.unreachable, first.strangers = ["10.9.9.9"], 4
    first.write(tmp_path / "a.json")
    assert HostRecord.read(tmp_path / "a.json") == first


@pytest.mark.parametrize(
    "change",
    [
        {"format": "else"},
        {"host": "spine"},
        {"host": None},
        {"stamps": "sundial"},
        {"sent": [["10.1.1.2", 0, -1]]},
        {"sent": [["10.1.1.2", 0, 10**9]]},
        {"sent": [["10.1.1.2", "0", 1]]},
        {"sent": 3},
        {"strangers": float("inf")},
        {"received": [["10.1.1.2", 0, [5]]]},
        {"received": [["10.1.1.2", 0, [[1, 1.5]]]]},
        {"received": [["10.1.1.2", 0, [[1, 1 << 80]]]]},
        {"received": [["10.1.1.2", 0, [[-1, 5]]]]},
        {"hops": [["10.1.1.2", 0, ["x"]]]},
        {"hops": [["10.1.1.2", 0, [None] * 99]]},
    ],
)
def test_lying_record_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    [first, *_] = records()
    path = tmp_path / "a.json"
    first.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="is not a record"):
        HostRecord.read(path)


def test_command_names_the_link_draws_it_and_says_what_it_cannot_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    files: list[str] = []
    for record in records(lossy="leaf1->spine2"):
        path = tmp_path / f"{record.host}.json"
        record.write(path)
        files.append(str(path))
    names = tmp_path / "names.toml"
    names.write_text("".join(f'"{address}" = "{name}"\n' for address, name in NAMES.items()))
    picture = tmp_path / "fabric.svg"
    assert main(["fleet", "links", *files, "--names", str(names), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "link leaf1->spine2: " in out
    assert "no slow link or switch" in out
    assert "links have no direction here: no clock offsets were given" in out
    assert "not those of the job's traffic" in out
    assert "leaf1" in picture.read_text()
    assert main(["fleet", "links", *files, "--names", str(names), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [finding["component"] for finding in record["lossy"]] == ["leaf1->spine2"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["/nowhere.json", "/nowhere2.json"], "cannot read /nowhere.json"),
        (["{one}"], "one of each of two or more"),
        (["{one}", "{one}"], "one of each of two or more"),
        (["{one}", "{text}"], "is not JSON"),
        (["{one}", "--min-late-us", "0"], "--min-late-us must be more than 0"),
        (["{one}", "--names", "{text}"], "cannot read names"),
        (["{one}", "{two}", "--clocks", "{text}"], "does not hold clock offsets"),
        (["{one}", "{two}", "--clocks", "{nan}"], "does not hold clock offsets"),
    ],
)
def test_bad_input_gets_a_clear_word(
    args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("one", "two", "text", "nan")}
    for record, name in zip(records(), ("one", "two"), strict=False):
        record.write(paths[name])
    paths["text"].write_text("hello")
    # A bound that is no number compares with nothing, and so would pass for a good one.
    offset = {"offset_s": 0.0, "bound_s": float("nan"), "skew": 0.0, "at_s": 0.0}
    paths["nan"].write_text(json.dumps({"hosts": {"10.1.1.1": offset}}))
    filled = [arg.format(**paths) for arg in args]
    assert main(["fleet", "links", *filled]) == 2
    assert says in capsys.readouterr().err


def test_file_without_an_end_is_left_after_as_much_as_a_record_may_be() -> None:
    with pytest.raises(ConfigError, match="larger than a record may be"):
        read_record(
            Path("/dev/zero"), HostRecord, form="f", command="trainonce fleet probe", max_bytes=1000
        )


def test_link_names_keep_their_ends() -> None:
    assert link_ends(link_name("b", "a", directed=True)) == ("b", "a")
    assert link_ends(link_name("b", "a", directed=False)) == ("a", "b")
