"""The topology as a picture, the culprits marked."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any

from trainonce.fleet.links.topology import link_ends
from trainonce.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from trainonce.fleet.links.locate import Finding

_MAX_DEVICES = 60


def draw_topology(
    links: Sequence[str], hosts: Sequence[str], findings: Sequence[Finding], path: Path
) -> None:
    """Draw devices in layers, hosts at the bottom, and mark the culprits.

    A fabric of more than 60 devices is cut to the culprits and their neighbours; where there is no
    culprit, nothing is left but a line that says so.

    Args:
        links: Names of all links, directed or not.
        hosts: Devices at the edge.
        findings: What was located; a name with "->" or "--" is a link, another one a switch.
        path: A .svg, .png or .pdf file.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(10, 5)
    wires = sorted({tuple(sorted(link_ends(name))) for name in links})
    near: dict[str, set[str]] = {}
    for a, b in wires:
        near.setdefault(a, set()).add(b)
        near.setdefault(b, set()).add(a)
    shown = set(near)
    if len(shown) > _MAX_DEVICES:
        ends = {end for finding in findings for end in _ends(finding) if end in near}
        shown = ends.union(*(near[end] for end in ends))
    place = _places(near, hosts, shown)
    axes = figure.add_subplot()
    for a, b in wires:
        if a in place and b in place:
            axes.plot(*zip(place[a], place[b], strict=True), color="0.75", linewidth=1, zorder=1)
    for device, (x, y) in place.items():
        _box(axes, device, x, y, host=device in hosts, culprit=False)
    for finding in findings:
        _mark(axes, finding, place)
    if len(shown) < len(near):
        told = f"{len(shown)} of {len(near)} devices: culprits and neighbours"
        axes.set_title(told if shown else f"{len(near)} devices, no culprit", fontsize=8)
    axes.margins(0.08, 0.15)
    axes.axis("off")
    save_figure(figure, path, dpi=140)


def _ends(finding: Finding) -> tuple[str, ...]:
    return link_ends(finding.component) if finding.kind == "link" else (finding.component,)


def _places(
    near: Mapping[str, set[str]], hosts: Sequence[str], shown: set[str]
) -> dict[str, tuple[float, float]]:
    """Place each device by its distance from the hosts, and near the middle of what is below."""
    layer = dict.fromkeys((host for host in hosts if host in near), 0)
    queue = deque(sorted(layer))
    while queue:
        device = queue.popleft()
        for other in sorted(near[device]):
            if other not in layer:
                layer[other] = layer[device] + 1
                queue.append(other)
    layer = {device: layer.get(device, 1) for device in sorted(shown)}
    place: dict[str, tuple[float, float]] = {}
    for y in sorted(set(layer.values())):
        row = [device for device in layer if layer[device] == y]

        def middle(device: str) -> tuple[float, str]:
            below = [place[other][0] for other in near[device] if other in place]
            return (sum(below) / len(below) if below else 0.0, device)

        # A host stands by its switch: hosts of one neighbour next to each other.
        by_switch = {host: min(near[host]) for host in row}
        if y == 0:
            row.sort(key=lambda host: (by_switch[host], _natural(host)))
        else:
            row.sort(key=middle)
        for i, device in enumerate(row):
            place[device] = ((i + 0.5) / len(row), float(y))
    return place


def _natural(name: str) -> list[str]:
    """Sort key in which host10 follows host9, and 10.0.0.10 follows 10.0.0.9."""
    return [part.rjust(9, "0") if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _box(axes: Any, device: str, x: float, y: float, *, host: bool, culprit: bool) -> None:
    axes.text(
        x,
        y,
        f"✗ {device}" if culprit else device,
        ha="center",
        va="center",
        fontsize=7,
        rotation=90 if host else 0,
        zorder=4,
        color="white" if culprit else "black",
        bbox={
            "boxstyle": "round,pad=0.3" if host else "square,pad=0.4",
            "facecolor": "#b00020" if culprit else "white",
            "edgecolor": "#b00020" if culprit else "0.4",
            "linewidth": 1,
        },
    )


def _mark(axes: Any, finding: Finding, place: Mapping[str, tuple[float, float]]) -> None:
    ends = _ends(finding)
    if any(end not in place for end in ends):
        return
    label = f"{finding.share_bad:.1%} of {finding.sent} bad, confidence {finding.confidence:.2f}"
    if finding.kind == "switch":
        (x, y) = place[ends[0]]
        _box(axes, ends[0], x, y, host=False, culprit=True)
        spot = (x, y)
    else:
        (x0, y0), (x1, y1) = place[ends[0]], place[ends[1]]
        arrow = "-|>" if "->" in finding.component else "-"
        axes.annotate(
            "",
            (x1, y1),
            (x0, y0),
            zorder=3,
            arrowprops={"arrowstyle": arrow, "color": "#b00020", "linewidth": 2.5,
                        "shrinkA": 14, "shrinkB": 14, "mutation_scale": 16},
        )  # fmt: skip
        spot = ((x0 + x1) / 2, (y0 + y1) / 2)
    axes.annotate(
        f"{finding.component}\n{label}",
        spot,
        xytext=(14, -22),
        textcoords="offset points",
        fontsize=7,
        color="#b00020",
        zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
