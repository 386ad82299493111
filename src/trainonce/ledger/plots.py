"""The report's plots as inline SVG. Marks differ in shape and carry words, not colour alone."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from trainonce.ledger.facts import since_start
from trainonce.ledger.words import duration, percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.ledger.guarantee import Guarantee
    from trainonce.ledger.report import IncidentReport, JobReport

# Of the palette of Okabe and Ito (2008), told apart with any common colour blindness.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#57606a"
_WIDTH = 900
_MAX_POINTS = 600

# What the marks of `progress` mean.
KEYS = (
    "Marks above carry these numbers. Circle: no lost progress. Cross: progress lost. "
    "Triangle: not counted (chaos, planned, user code, or a plain script)."
)


def interval(guarantee: Guarantee) -> str:
    """Return the share and its interval against what is guaranteed, on a line from 0 to 100 %."""
    left, right, y = 20, _WIDTH - 20, 46

    def x(share: float) -> float:
        return left + share * (right - left)

    marks = "".join(
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y - 5}" y2="{y + 5}" stroke="{_GREY}"/>'
        f'<text class="quiet" x="{x(tick):.1f}" y="{y + 24}" text-anchor="middle">'
        f"{100 * tick:.0f} %</text>"
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    required = x(guarantee.required)
    marks += (
        f'<line x1="{required:.1f}" x2="{required:.1f}" y1="{y - 26}" y2="{y + 10}" '
        f'stroke="{_ORANGE}" stroke-width="2" stroke-dasharray="5 3"/>'
        f'<text x="{required - 6:.1f}" y="{y - 18}" text-anchor="end">'
        f"guaranteed {percent(guarantee.required)}</text>"
    )
    if guarantee.share is not None:
        low, high, at = x(guarantee.low), x(guarantee.high), x(guarantee.share)
        marks += (
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{_BLUE}" '
            f'stroke-width="7" stroke-opacity=".45"/>'
            f'<circle cx="{at:.1f}" cy="{y}" r="7" fill="{_BLUE}"/>'
        )
    words = "no failures yet" if guarantee.share is None else f"resolved {percent(guarantee.share)}"
    axis = f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="{_GREY}"/>'
    return _svg(78, f"Guarantee: {words}", axis + marks)


def bars(values: dict[str, float], words: Callable[[float], str]) -> str:
    """Return one horizontal bar a name, with its value in words."""
    left, row = 180, 28
    top = max(values.values(), default=0.0) or 1.0
    parts: list[str] = []
    for index, (name, value) in enumerate(values.items()):
        y = index * row
        width = value / top * (_WIDTH - left - 150)
        parts.append(
            f'<text x="{left - 10}" y="{y + 18}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{left}" y="{y + 4}" width="{width:.1f}" height="{row - 9}" fill="{_BLUE}"/>'
            f'<text x="{left + width + 8:.1f}" y="{y + 18}">{html.escape(words(value))}</text>'
        )
    return _svg(row * len(values), "Lost by cause", "".join(parts))


def progress(job: JobReport) -> str:
    """Return committed steps over time, with the incidents marked; "" without any progress."""
    points = job.facts.progress
    if len(points) < 2:
        return ""
    stride = max(1, len(points) // _MAX_POINTS)
    shown = [*points[::stride], points[-1]]
    left, right, top, bottom = 70, _WIDTH - 20, 48, 250
    end_s = max(job.time.elapsed_s, shown[-1][0]) or 1.0
    most = max(step for _, step in shown) or 1

    def x(at_s: float) -> float:
        return left + at_s / end_s * (right - left)

    def y(step: float) -> float:
        return bottom - step / most * (bottom - top)

    line = " ".join(f"{x(at_s):.1f},{y(step):.1f}" for at_s, step in shown)
    axes = (
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="{_GREY}"/>'
        f'<text class="quiet" x="{left - 8}" y="{bottom + 4}" text-anchor="end">0</text>'
        f'<text class="quiet" x="{left - 8}" y="{top + 5}" text-anchor="end">{most:,}</text>'
        f'<text class="quiet" x="{left}" y="{top - 30}">committed steps</text>'
        f'<text class="quiet" x="{right}" y="{bottom + 20}" text-anchor="end">'
        f"{duration(end_s)}</text>"
        f'<text class="quiet" x="{left}" y="{bottom + 20}">0 s</text>'
    )
    curve = f'<polyline points="{line}" fill="none" stroke="{_BLUE}" stroke-width="2.5"/>'
    marks = "".join(
        _mark(
            incident,
            number,
            x(min(since_start(job.facts, incident.event), end_s)),
            y(min(incident.event.step, most)),
        )
        for number, incident in enumerate(job.incidents, 1)
    )
    return _svg(bottom + 28, "Committed steps over time", axes + curve + marks)


def _mark(incident: IncidentReport, number: int, x: float, y: float) -> str:
    title = f"<title>{html.escape(incident.sentence)}</title>"
    if not incident.resolved:
        shape = (
            f'<path d="M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12" stroke="{_ORANGE}" '
            f'stroke-width="3.5"/>'
        )
    elif incident.counts_as != "failure":
        shape = (
            f'<path d="M{x:.1f} {y - 8:.1f}l7 13h-14z" fill="#fff" stroke="{_GREY}" '
            f'stroke-width="2"/>'
        )
    else:
        shape = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="#fff" stroke="{_GREEN}" '
            f'stroke-width="3"/>'
        )
    return f'<g>{title}{shape}<text x="{x + 9:.1f}" y="{y + 18:.1f}">{number}</text></g>'


def _svg(height: int, label: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(label)}">'
        f"{content}</svg>"
    )
