"""Faults in a real-kernel Clos of network namespaces, probed by real processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainonce.cli.main import main
from trainonce.fleet.links.locate import Finding, locate
from trainonce.fleet.links.topology import Fabric, build_fabric
from trainonce.testing.clos import Clos, why_no_faults
from trainonce.testing.namespaces import NetworkLab

REASON = why_no_faults()
pytestmark = [pytest.mark.netns, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def clos() -> Iterator[Clos]:
    with NetworkLab() as lab:
        yield Clos(lab)


def round_of(clos: Clos, folder: Path) -> tuple[Fabric, list[Finding]]:
    fabric = build_fabric(clos.probe(folder), clos.names)
    return fabric, locate(fabric.loss())


def test_healthy_fabric_is_learned_whole_and_names_nothing(clos: Clos, tmp_path: Path) -> None:
    fabric, found = round_of(clos, tmp_path)
    assert found == []
    assert len(fabric.flows) == 6 * 5 * 8
    assert sorted({name for flow in fabric.flows for name in flow.links()}) == clos.links
    assert fabric.notes == []


@pytest.mark.parametrize("link", ["leaf1->spine2", "spine1->leaf3", "host5->leaf3"])
def test_lossy_link_is_named_with_its_direction(clos: Clos, link: str, tmp_path: Path) -> None:
    clos.lose(link, per_mille=30)
    try:
        fabric, found = round_of(clos, tmp_path)
    finally:
        clos.heal(link)
    over = [flow for flow in fabric.flows if link in flow.links()]
    assert sum(flow.lost for flow in over) > 0, "the fault did not fire"
    assert [finding.component for finding in found] == [link]


def test_link_that_lets_nothing_through_is_named(clos: Clos, tmp_path: Path) -> None:
    clos.lose("leaf2->spine1", per_mille=1000)
    try:
        fabric, found = round_of(clos, tmp_path)
    finally:
        clos.heal("leaf2->spine1")
    assert sum(flow.lost == flow.sent for flow in fabric.flows) > 0, "the fault did not fire"
    assert [finding.component for finding in found] == ["leaf2->spine1"]


def test_command_finds_the_switches_without_being_told_their_addresses(
    clos: Clos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clos.lose("leaf3->spine1", per_mille=30)
    try:
        clos.probe(tmp_path)
    finally:
        clos.heal("leaf3->spine1")
    files = sorted(map(str, tmp_path.glob("probe-*.json")))
    assert main(["fleet", "links", *files, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["devices"]) == 6 + 5
    [finding] = record["lossy"]
    ends = [clos.names[address] for address in finding["component"].split("->")]
    assert ends == ["leaf3", "spine1"]
