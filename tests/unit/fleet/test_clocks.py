"""Clock comparison on simulated probes, where the truth is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from trainonce.cli.main import main
from trainonce.errors import ConfigError
from trainonce.fleet.clocks.edge import Pairs, fit_edge
from trainonce.fleet.clocks.network import solve_potentials
from trainonce.fleet.clocks.probe import ClockProbeSettings
from trainonce.fleet.clocks.record import ClockRecord
from trainonce.fleet.clocks.sync import synchronise
from trainonce.testing.clock_lab import WrongClock, start_ns, sync_errors_s, with_wrong_clocks

HOSTS = [f"10.3.0.{i}" for i in range(1, 5)]
DELAY_S = 10e-6


def queues(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Waiting times: half of the packets find a queue, some of them a long one."""
    return np.where(rng.random(shape) < 0.5, rng.pareto(1.2, shape) * 50e-6, 0.0)


def pairs(rng: np.random.Generator, offset_s: float, skew: float, sign: int) -> Pairs:
    """200 pairs in [0, 2) s from A to B (sign 1) or from B to A (-1); B is A plus the offset."""
    true_s = np.sort(rng.uniform(0, 2, 200))[:, None] + np.array([0.0, 20e-6])
    delay_s = DELAY_S + queues(rng, true_s.shape) + rng.normal(0, 30e-9, true_s.shape)
    tx_s, rx_s = true_s, true_s + delay_s
    b = rx_s if sign > 0 else tx_s
    b += offset_s + skew * b
    return Pairs(tx_s, rx_s)


@pytest.mark.parametrize(("offset_s", "skew"), [(0.0, 0.0), (5e-3, 2e-5), (-3e-3, -2e-5)])
def test_line_between_the_bounds_is_the_offset_whatever_queues_there_are(
    offset_s: float, skew: float
) -> None:
    rng = np.random.default_rng(1)
    fit = fit_edge(pairs(rng, offset_s, skew, 1), pairs(rng, offset_s, skew, -1), 1.0)
    assert fit is not None
    assert abs(fit.at(1.0) - (offset_s + skew)) < 0.2e-6
    assert abs(fit.skew - skew) < 0.3e-6
    assert fit.margin_s == pytest.approx(DELAY_S, rel=0.1)


def test_too_few_probes_give_no_fit() -> None:
    rng = np.random.default_rng(1)
    few = pairs(rng, 0.0, 0.0, 1).select(np.arange(200) < 3)
    assert fit_edge(few, pairs(rng, 0.0, 0.0, -1), 1.0) is None


def test_clock_that_jumps_within_a_window_gives_no_fit() -> None:
    rng = np.random.default_rng(1)
    forth, back = pairs(rng, 0.0, 0.0, 1), pairs(rng, 0.0, 0.0, -1)
    forth.rx_s[forth.tx_s > 1.0] += 1e-3
    back.tx_s[back.rx_s > 1.0] += 1e-3
    assert fit_edge(forth, back, 1.0) is None


def test_coded_pairs_are_those_that_kept_their_distance() -> None:
    tx = np.array([[0.0, 1e-5], [1.0, 1.00001]])
    rx = np.array([[0.5, 0.50001], [1.5, 1.5001]])
    assert Pairs(tx, rx).coded(1e-6).tolist() == [True, False]


def test_network_effect_averages_errors_and_finds_asymmetric_paths() -> None:
    rng = np.random.default_rng(0)
    n, neighbours = 256, 10
    edges = np.array(
        sorted({(min(i, j), max(i, j)) for i in range(n)
                for j in rng.choice(n, neighbours, replace=False) if i != j})
    )  # fmt: skip
    true = rng.normal(0, 1e-3, n)
    noise = rng.normal(0, 30e-9, len(edges))
    uneven = rng.random(len(edges)) < 0.05
    noise += np.where(uneven, rng.choice([-1, 1], len(edges)) * rng.uniform(1e-6, 1e-5), 0)
    solved = solve_potentials(edges, true[edges[:, 1]] - true[edges[:, 0]] + noise, n)
    errors = solved.values - (true - true[0])
    assert np.std(errors) < 15e-9, "better than the 30 ns of a single edge"
    named = np.abs(solved.residuals) > 6 * solved.sigma
    assert (named & uneven).sum() == uneven.sum()
    assert (named & ~uneven).sum() <= 1


def test_node_that_nothing_connects_has_no_value() -> None:
    solved = solve_potentials(np.array([[0, 1]]), np.array([2.0]), 3)
    assert solved.values[:2].tolist() == pytest.approx([0.0, 2.0])
    assert np.isnan(solved.values[2])


def measured(
    seed: int = 0,
    duration_s: float = 10.0,
    longer: tuple[str, str] | None = None,
    hosts: list[str] = HOSTS,
) -> list[ClockRecord]:
    """Return what true clocks would have stamped; `longer` adds 20 µs one way between two hosts."""
    rng = np.random.default_rng(seed)
    records = {host: ClockRecord(host=host, stamps="kernel") for host in hosts}
    for a in hosts:
        for b in hosts:
            if a == b:
                continue
            count = int(100 * duration_s)
            sent_s = np.sort(rng.uniform(0, duration_s, count))[:, None] + np.array([0.0, 2e-5])
            delay_s = DELAY_S + queues(rng, sent_s.shape) + 20e-6 * (longer == (a, b))
            sent = np.rint(sent_s * 1e9).astype(int) + 1_700_000_000 * 10**9
            came = sent + np.rint(delay_s * 1e9).astype(int)
            records[a].sent[b] = [(p, w, int(sent[p, w])) for p in range(count) for w in (0, 1)]
            records[b].received[a] = [(p, w, int(came[p, w])) for p in range(count) for w in (0, 1)]
    return list(records.values())


def wrong_clocks(seed: int = 0, spread_s: float = 5e-3) -> list[WrongClock]:
    rng = np.random.default_rng(seed)
    return [
        WrongClock(float(rng.uniform(-spread_s, spread_s)), float(rng.uniform(-2e-5, 2e-5)))
        for _ in HOSTS
    ]


@pytest.mark.parametrize("spread_s", [5e-3, 86_400.0])
def test_offsets_skews_and_bounds_hold_for_all_hosts(spread_s: float) -> None:
    truth, clocks = measured(), wrong_clocks(spread_s=spread_s)
    report = synchronise(with_wrong_clocks(truth, clocks))
    assert set(report.clocks) == set(HOSTS)
    assert report.notes == []
    assert report.asymmetries == []
    errors = sync_errors_s(report, dict(zip(HOSTS, clocks, strict=True)), start_ns(truth))
    # Time stamps of a day's distance are floats here; their own rounding is a part of it.
    slack_s = 1e-9 + spread_s * 1e-12
    for i, host in enumerate(HOSTS[1:], start=1):
        found = report.clocks[host]
        assert np.abs(errors[host]).max() <= found.bound_s + slack_s
        assert found.bound_s <= found.worst_s <= 4 * DELAY_S
        assert found.skew == pytest.approx(clocks[i].skew - clocks[0].skew, abs=1e-7)
        assert found.jumps == []


def test_longer_way_is_told_from_a_wrong_clock() -> None:
    truth = measured(longer=(HOSTS[1], HOSTS[2]))
    report = synchronise(with_wrong_clocks(truth, wrong_clocks()))
    [alarm] = report.asymmetries
    assert (alarm.a, alarm.b) == (HOSTS[1], HOSTS[2])
    assert alarm.longer_s == pytest.approx(20e-6, rel=0.3)


def test_clock_that_is_set_while_probing_is_reported_and_followed() -> None:
    truth = measured(duration_s=12.0)
    begin_ns = start_ns(truth)
    jumper = truth[2]
    for table in (jumper.sent, jumper.received):
        for peer, rows in table.items():
            table[peer] = [(p, w, t + 3_000_000 * (t - begin_ns > 6.7e9)) for p, w, t in rows]
    report = synchronise(truth)
    [(when_s, step_s)] = report.clocks[HOSTS[2]].jumps
    assert step_s == pytest.approx(3e-3, rel=0.01)
    assert abs(when_s - begin_ns / 1e9 - 6.7) < 2.5
    assert report.clocks[HOSTS[2]].offset_s == pytest.approx(3e-3, abs=1e-6)
    assert abs(report.clocks[HOSTS[2]].skew) < 1e-7, "the jump is no drift"
    assert report.clocks[HOSTS[1]].jumps == []


def test_what_limits_the_answer_is_said() -> None:
    records = measured(duration_s=4.0, hosts=HOSTS[:2])
    records[0].stamps = "user"
    records[0].unreachable, records[1].strangers = ["10.3.0.9"], 7
    notes = "\n".join(synchronise(records).notes)
    for words in (
        "stamps from user space on 10.3.0.1",
        "no loop of hosts",
        "fewer than 3 windows",
        "10.3.0.1 never heard 10.3.0.9",
        "10.3.0.2 dropped 7 packets of strangers",
    ):
        assert words in notes


def test_record_that_lies_about_its_times_keeps_nobody_busy() -> None:
    records = measured(duration_s=4.0)
    liar = records[1]
    for rows in liar.sent.values():
        rows[:] = [(p, w, t + (p % 50) * 10**16) for p, w, t in rows]
    report = synchronise(records)
    assert report.num_windows <= 60
    honest = report.clocks[HOSTS[2]]
    assert abs(honest.offset_s) <= honest.worst_s


def test_host_that_nobody_hears_is_left_out_and_named() -> None:
    records = measured(duration_s=4.0)
    lost = records[3]
    lost.received.clear()
    report = synchronise(records)
    assert lost.host not in report.clocks
    assert any(f"not compared, too few probes both ways: {lost.host}" in n for n in report.notes)


def test_command_prints_offsets_bounds_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clocks = wrong_clocks()
    files: list[str] = []
    for record in with_wrong_clocks(measured(), clocks):
        record.write(tmp_path / f"{record.host}.json")
        files.append(str(tmp_path / f"{record.host}.json"))
    assert main(["fleet", "clocks", *files]) == 0
    out = capsys.readouterr().out
    assert "clocks less that of 10.3.0.1, 5 windows, kernel time stamps" in out
    assert "the bound holds where ways there and back are equally long" in out
    assert main(["fleet", "clocks", *files, "--reference", HOSTS[2], "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["reference"] == HOSTS[2]
    assert record["hosts"][HOSTS[2]]["offset_s"] == 0.0
    assert set(record["hosts"][HOSTS[0]]) >= {"offset_s", "bound_s", "worst_s", "skew", "at_s"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["{a}"], "one of each of two or more"),
        (["{a}", "{a}"], "one of each of two or more"),
        (["{a}", "{b}", "--reference", "10.9.9.9"], "no record of the reference"),
        (["{a}", "{b}", "--window-s", "0"], "a window must last"),
        (["{a}", "{b}", "--window-s", "nan"], "a window must last"),
        (["{a}", "{empty}"], "no two clocks could be compared"),
        (["{a}", "/nowhere.json"], "cannot read /nowhere.json"),
        (["{a}", "{text}"], "is not JSON"),
    ],
)
def test_bad_input_gets_a_clear_word(
    args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("a", "b", "empty", "text")}
    for record, name in zip(measured(duration_s=2.0, hosts=HOSTS[:2]), ("a", "b"), strict=True):
        record.write(paths[name])
    ClockRecord(host="10.3.0.8").write(paths["empty"])
    paths["text"].write_text("hello")
    assert main(["fleet", "clocks", *(arg.format(**paths) for arg in args)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"format": "else"},
        {"host": "gpu"},
        {"stamps": "sundial"},
        {"sent": {"10.3.0.2": [[1, 2, 3]]}},
        {"sent": {"10.3.0.2": [[1, 0, -3]]}},
        {"sent": {"10.3.0.2": [[1, 0, 1 << 70]]}},
        {"sent": {"10.3.0.2": [[1, 0, 0.5]]}},
        {"sent": {"gpu": []}},
        {"received": []},
        {"strangers": float("inf")},
        {"received": {"10.3.0.2": 3}},
    ],
)
def test_lying_record_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    ClockRecord(host=HOSTS[0]).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="is not a record"):
        ClockRecord.read(path)


def test_neighbours_of_many_hosts_are_few_and_mutual() -> None:
    hosts = [f"10.4.{i // 200}.{i % 200}" for i in range(300)]
    chosen = {
        host: ClockProbeSettings(host=host, peers=tuple(h for h in hosts if h != host)).neighbours()
        for host in hosts[::7] + hosts[:12]
    }
    for host, neighbours in chosen.items():
        assert len(neighbours) == 10
        for other in neighbours:
            assert other not in chosen or host in chosen[other]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"host": "gpu-1"}, "not an IPv4 address"),
        ({"peers": ()}, "must be other hosts"),
        ({"port": 1}, "port must lie"),
        ({"duration_s": 0}, "duration_s must lie"),
        ({"pairs_per_s": 1e9}, "pairs_per_s must lie"),
        ({"pairs_per_s": float("nan")}, "pairs_per_s must lie"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ClockProbeSettings(**({"host": "127.0.0.1", "peers": ("127.0.0.2",)} | changes))
