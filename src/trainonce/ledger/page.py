"""The report as one self-contained HTML page: inline SVG, no script, nothing loaded."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from trainonce.ledger import plots
from trainonce.ledger.text import energy_words, guarantee_lines, mark, seen_lines, steps_words
from trainonce.ledger.words import count, day, duration, hours, percent, quantity, usd, when

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.ledger.report import JobReport, Report
    from trainonce.ledger.totals import Totals

# Jobs drawn in full; the table holds all.
_DRAWN = 12

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin-top: 2rem; }
.quiet { color: #57606a; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #d0d7de;
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem;
  margin: 1.5rem 0; padding: 0; } .card { border: 1px solid #d0d7de; border-radius: 8px;
  padding: .8rem 1rem; } .card dt { color: #57606a; font-size: .85rem; } .card dd { margin: 0;
  font-size: 1.25rem; font-weight: 600; white-space: nowrap; } .card small { font-size: .8rem;
  font-weight: 400; color: #57606a; display: block; white-space: normal; }
svg { width: 100%; height: auto; display: block; margin: .5rem 0 1rem; }
svg text { font: 13px system-ui, sans-serif; fill: #1b1f24; } svg .quiet { fill: #57606a; }
li { margin: .3rem 0; } code { font-size: .9em; }
"""


def page(report: Report) -> str:
    """Return the page as text. Everything that came from a ledger is escaped."""
    body = "".join(
        (
            "<h1>TrainOnce report</h1>",
            f'<p class="quiet">{_text(report.ledger)}, {when(report.generated_wall_s)}</p>',
            *(_content(report) if report.jobs else ["<p>No jobs in this ledger.</p>"]),
        )
    )
    for unit in ("%", "GPU-h", "kWh"):  # a number and its unit stay on one line
        body = body.replace(f" {unit}", f"\u00a0{unit}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>TrainOnce report</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _content(report: Report) -> list[str]:
    guarantee = report.guarantee
    parts = [
        _cards(report.totals, report),
        "<h2>Guarantee</h2>",
        plots.interval(guarantee),
        *(f"<p>{_text(line.strip())}</p>" for line in guarantee_lines(guarantee)),
        "<h2>Where device time was lost</h2>",
        plots.bars(report.totals.lost_gpu_hours_by_cause, hours),
        "<h2>Jobs</h2>",
        _jobs_table(report.jobs),
    ]
    if len(report.by_project) > 1:
        parts += ["<h2>Projects</h2>", _projects_table(report.by_project)]
    for job in report.jobs[:_DRAWN]:
        parts += _job(job)
    if len(report.jobs) > _DRAWN:
        parts.append(f'<p class="quiet">The latest {_DRAWN} jobs are shown in full.</p>')
    if report.num_unknown:
        parts.append(
            f"<p>{count(report.num_unknown, 'row')} passed over: a newer version wrote them.</p>"
        )
    return parts


def _cards(totals: Totals, report: Report) -> str:
    period = f"since {day(report.guarantee.begin_wall_s)}"
    share = "none yet" if report.guarantee.share is None else percent(report.guarantee.share)
    cards = [
        (
            "Failures with no lost progress",
            share,
            f"{count(report.guarantee.n, 'failure')} {period}",
        ),
        ("Effective training time", percent(totals.ettr), "ETTR over all jobs shown"),
        ("Device time", hours(totals.gpu_hours), f"{count(totals.jobs, 'job')}, spares included"),
        ("Lost", hours(totals.lost_gpu_hours), _money(totals.lost_cost_usd)),
        (
            "Saved by surviving failures",
            hours(totals.saved_gpu_hours),
            _money(totals.saved_cost_usd),
        ),
        (
            "Saved by stored results",
            hours(totals.graph_saved_gpu_hours),
            _money(totals.graph_saved_cost_usd),
        ),
    ]
    if totals.facility_kwh is not None:
        carbon = "no country set" if totals.co2_kg is None else f"{quantity(totals.co2_kg)} kg CO2e"
        kind = "estimate" if totals.energy_is_estimate else "measured"
        cards.append(("Energy", f"{quantity(totals.facility_kwh)} kWh", f"{carbon}, {kind}"))
    return '<dl class="cards">{}</dl>'.format(
        "".join(
            f'<div class="card"><dt>{_text(name)}</dt><dd>{_text(value)}'
            f"<small>{_text(note)}</small></dd></div>"
            for name, value, note in cards
        )
    )


def _job(job: JobReport) -> list[str]:
    summary, money = job.facts.summary, job.economics
    plot = plots.progress(job)
    parts = [
        f"<h3>{_text(summary.job)}: {_text(summary.script)}</h3>",
        (
            f"<p>{_text(summary.outcome)}{_text(': ' + summary.reason if summary.reason else '')}. "
            f"Began {when(summary.started_wall_s)} on {_text(summary.host)}, "
            f"{duration(job.time.elapsed_s)}, {count(summary.world_size, 'rank')}, "
            f"{count(summary.spares, 'spare')}, {count(summary.steps, 'committed step')}. "
            f"ETTR {percent(job.time.ettr)}, goodput {percent(job.time.goodput)}, "
            f"MFU {percent(job.time.mfu)}. {_text(steps_words(job.facts))}.</p>"
        ),
        plot,
        plots.bars(job.time.lost_s, duration),
    ]
    if job.incidents:
        parts += [f'<p class="quiet">{plots.KEYS}</p>' if plot else "", "<ol>"]
        for incident in job.incidents:
            words = _text(mark(incident))
            parts.append(f"<li>{_text(incident.sentence)} <strong>[{words}]</strong></li>")
        parts.append("</ol>")
    if seen := seen_lines(job.facts):
        parts += ["<p>Seen:</p><ul>", *(f"<li>{_text(line)}</li>" for line in seen), "</ul>"]
    parts.append(
        f"<p>Cost {usd(money.cost_usd)}, lost {usd(money.lost_cost_usd)}, saved against restarts "
        f"from the last checkpoint on disk {usd(money.saved_cost_usd)} "
        f"({hours(money.saved_gpu_hours)}). Energy: {_text(energy_words(money.energy))}.</p>"
    )
    for lever, expected in money.expected_gpu_hours.items():
        parts.append(
            f"<p>Lever {_text(lever)}: {hours(expected)} saved (expected, not measured).</p>"
        )
    return parts


def _jobs_table(jobs: Sequence[JobReport]) -> str:
    head = ("Job", "Project", "Began", "Outcome", "#Elapsed", "#Ranks", "#Steps", "#Incidents",
            "#ETTR", "#Cost", "#Saved")  # fmt: skip
    rows = [
        (
            job.facts.summary.job,
            job.facts.summary.project,
            when(job.facts.summary.started_wall_s),
            job.facts.summary.outcome,
            duration(job.time.elapsed_s),
            str(job.facts.summary.world_size),
            str(job.facts.summary.steps),
            str(len(job.incidents)),
            percent(job.time.ettr),
            usd(job.economics.cost_usd),
            usd(job.economics.saved_cost_usd),
        )  # fmt: skip
        for job in jobs
    ]
    return _table(head, rows)


def _projects_table(projects: dict[str, Totals]) -> str:
    head = ("Project", "#Jobs", "#Held", "#Lost", "#Saved", "#Cost", "#ETTR")
    rows = [
        (
            name,
            str(one.jobs),
            hours(one.gpu_hours),
            hours(one.lost_gpu_hours),
            hours(one.saved_gpu_hours),
            usd(one.cost_usd),
            percent(one.ettr),
        )  # fmt: skip
        for name, one in projects.items()
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; a heading that begins with # holds numbers."""
    kinds = [' class="n"' if name.startswith("#") else "" for name in head]
    top = "".join(
        f'<th scope="col"{kind}>{_text(name.lstrip("#"))}</th>'
        for kind, name in zip(kinds, head, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _money(amount: float | None) -> str:
    return "no price set" if amount is None else usd(amount)


def _text(value: str) -> str:
    return html.escape(value)
