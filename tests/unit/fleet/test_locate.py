"""Localisation on simulated fat trees, and on small fabrics worked out by hand."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from trainonce.errors import ConfigError
from trainonce.fleet.links.fattree import FatTree
from trainonce.fleet.links.locate import Observations, locate, with_switches

BACKGROUND = 5e-5


@pytest.fixture(scope="module")
def large() -> FatTree:
    return FatTree(16)


def score(tree: FatTree, seed: int, faults: int, loss: float, packets: int = 100) -> tuple:
    """Return (found, named, right) for one fabric with `faults` links that lose `loss`."""
    rng = np.random.default_rng(seed)
    rates = np.full(tree.num_links, BACKGROUND)
    bad = rng.choice(tree.num_links, faults, replace=False)
    rates[bad] = loss
    observed = tree.observe(rng, rates, flows_per_host=20, packets=packets)
    named = {finding.component for finding in locate(observed)}
    right = named & {tree.names[i] for i in bad}
    return len(right), len(named), faults


def test_fat_tree_is_wired_as_one(large: FatTree) -> None:
    assert (large.num_hosts, large.num_links) == (1024, 6144)
    assert len(large.switches) == 5 * 16**2 // 4
    paths = large.draw_paths(np.random.default_rng(0), 20)
    hops = np.asarray(paths.sum(axis=1)).ravel()
    assert set(hops) == {2.0, 4.0, 6.0}
    for flow in range(0, paths.shape[0], 997):
        ends = [large.names[i].split("->") for i in paths[flow].indices]
        starts, stops = {a for a, _ in ends}, {b for _, b in ends}
        assert len(starts - stops) == len(stops - starts) == 1, "a path is one unbroken line"


def test_one_percent_loss_is_named_with_precision_and_recall(large: FatTree) -> None:
    scores = np.array([score(large, seed, faults=8, loss=0.01) for seed in range(25)])
    found, named, true = scores.sum(axis=0)
    assert found / named >= 0.99
    assert found / true >= 0.95


def test_five_percent_loss_is_named_exactly(large: FatTree) -> None:
    scores = np.array([score(large, seed, faults=8, loss=0.05) for seed in range(10)])
    assert (scores[:, 0] == 8).all()
    assert (scores[:, 1] == 8).all()


@pytest.mark.parametrize("background", [0.0, 5e-5, 1e-3, 5e-3])
def test_healthy_fabric_names_nothing_whatever_it_loses_everywhere(background: float) -> None:
    tree = FatTree(8)
    for seed in range(25):
        rng = np.random.default_rng(seed)
        rates = np.full(tree.num_links, background)
        assert locate(tree.observe(rng, rates, flows_per_host=20, packets=100)) == []


def test_switch_that_loses_on_all_ports_is_named_as_a_switch(large: FatTree) -> None:
    for seed, switch in enumerate(("edge3.2", "agg7.0", "core12")):
        rng = np.random.default_rng(seed)
        rates = np.full(large.num_links, BACKGROUND)
        rates[large.switches[switch]] = 0.02
        other = large.names.index("host900->edge14.0")
        rates[other] = 0.05
        observed = large.observe(rng, rates, flows_per_host=20, packets=100)
        named = {finding.component: finding.kind for finding in locate(observed)}
        assert named == {switch: "switch", "host900->edge14.0": "link"}


def test_two_bad_links_at_one_switch_are_not_taken_for_the_switch(large: FatTree) -> None:
    rng = np.random.default_rng(3)
    rates = np.full(large.num_links, BACKGROUND)
    bad = ["edge1.4->host100", "host101->edge1.4"]
    rates[[large.names.index(name) for name in bad]] = 0.05
    observed = large.observe(rng, rates, flows_per_host=20, packets=100)
    assert sorted(finding.component for finding in locate(observed)) == bad


def by_hand(paths: list[list[int]], bad: list[float], num_links: int) -> Observations:
    matrix = np.zeros((len(paths), num_links))
    for flow, links in enumerate(paths):
        matrix[flow, links] = 1.0
    return Observations(
        components=[f"link{i}" for i in range(num_links)],
        num_links=num_links,
        members=[],
        paths=with_switches(csr_matrix(matrix), num_links, []),
        sent=np.full(len(paths), 1000.0),
        bad=np.array(bad),
    )


def test_finding_carries_its_evidence() -> None:
    paths = [[0, 2], [0, 3], [1, 2], [1, 3]]
    [finding] = locate(by_hand(paths, [50, 40, 0, 1], num_links=4))
    assert finding.component == "link0"
    assert (finding.flows, finding.sent, finding.bad) == (2, 2000, 90)
    assert finding.share_bad == pytest.approx(0.045)
    assert finding.background == pytest.approx(1.5 / 2000)
    assert finding.confidence > 0.99
    assert finding.rivals == ()


def test_links_that_carry_the_same_flows_are_named_as_rivals_with_half_the_confidence() -> None:
    # Links 0 and 1 are in a row: no probe can tell them apart.
    [finding] = locate(by_hand([[0, 1], [0, 1], [2], [2]], [50, 40, 0, 0], num_links=3))
    assert {finding.component, *finding.rivals} == {"link0", "link1"}
    assert finding.confidence == pytest.approx(0.5)


def test_nothing_sent_finds_nothing() -> None:
    empty = by_hand([[0]], [0], num_links=1)
    empty.sent[:] = 0
    assert locate(empty) == []


@pytest.mark.parametrize("k", [2, 5, -4])
def test_impossible_fat_tree_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match="even number of ports"):
        FatTree(k)
