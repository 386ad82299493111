"""The report as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.ledger.guarantee import FAILURE
from trainonce.ledger.words import count, day, duration, hours, percent, quantity, usd, when

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.ledger.economics import Audit, Energy
    from trainonce.ledger.facts import JobFacts
    from trainonce.ledger.guarantee import Guarantee
    from trainonce.ledger.report import IncidentReport, JobReport, Report
    from trainonce.ledger.totals import Totals

_NO_PRICE = "no price set: use --usd-per-gpu-hour, or [economics] in settings.toml"


def render(report: Report, *, detailed: bool, audit: bool = False) -> str:
    """Return the report as lines.

    Args:
        report: What to show.
        detailed: Each job in full; else one line a job.
        audit: Also the inputs and the arithmetic behind each saving.
    """
    if not report.jobs:
        return (
            f"No jobs in {report.ledger}.\n\n"
            "hint: start one with `trainonce run`, or set TRAINONCE_HOME to where it ran"
        )
    lines = [f"Ledger {report.ledger}", ""]
    if detailed:
        for job in report.jobs:
            lines += [*_job(job), ""]
    else:
        lines += [*_table(report.jobs), ""]
    if audit:
        for job in report.jobs:
            lines += _audits(job)
    lines += [*guarantee_lines(report.guarantee), ""]
    if not detailed:
        lines += [*_totals("All jobs shown", report.totals), ""]
        if len(report.by_project) > 1:
            for name, totals in report.by_project.items():
                lines += [*_totals(f"Project {name}", totals), ""]
    if report.num_unknown:
        lines += [f"{count(report.num_unknown, 'row')} passed over: a newer version wrote them", ""]
    return "\n".join(lines).rstrip()


def guarantee_lines(guarantee: Guarantee) -> list[str]:
    """Return how the guarantee stands, in a few lines."""
    period = f"{day(guarantee.begin_wall_s)} to {day(guarantee.end_wall_s)}"
    if not guarantee.of_all:
        period += ", the jobs shown only"
    if guarantee.share is None:
        lines = [f"Guarantee ({period}): no unplanned failures yet, so nothing to judge"]
    else:
        lines = [
            (
                f"Guarantee ({period}): {guarantee.resolved} of {guarantee.n} unplanned failures "
                f"resolved with no lost progress, {percent(guarantee.share)}"
            ),
            (
                f"  95 % interval {percent(guarantee.low)} to {percent(guarantee.high)} "
                f"(Clopper-Pearson), guaranteed {percent(guarantee.required)}: {guarantee.verdict}"
            ),
            "  by cause: "
            + ", ".join(
                f"{cause} {good}/{total}" for cause, (total, good) in guarantee.by_cause.items()
            ),
        ]
    if not guarantee.of_all:
        lines.append("  a credit goes by all jobs: `trainonce report` without a choice of jobs")
    if guarantee.credit_share:
        due = f"  credit due as it stands: {percent(guarantee.credit_share)} of the year's fee"
        if guarantee.credit_usd is not None:
            due += f" = {usd(guarantee.credit_usd)}"
        lines.append(due)
    apart = ", ".join(f"{name} {number}" for name, number in guarantee.apart.items())
    lines.append(f"  listed apart, not counted: {apart}")
    return lines


def energy_words(energy: Energy) -> str:
    """Return energy and carbon, and whether they are estimates."""
    if energy.it_kwh is None or energy.facility_kwh is None:
        return "not measured (gpu_tdp_w in settings.toml gives an estimate)"
    facility = f"{quantity(energy.facility_kwh)} kWh with the facility's share"
    words = f"{quantity(energy.it_kwh)} kWh, {facility}"
    if energy.co2_kg is not None:
        words += f", {quantity(energy.co2_kg)} kg CO2e"
    kind = "estimate" if energy.is_estimate else "measured"
    return f"{words} ({kind}: {energy.source})"


def mark(incident: IncidentReport) -> str:
    """Return whether progress was lost, and whether that counts."""
    words = "no lost progress" if incident.resolved else "PROGRESS LOST"
    if not incident.event.supported:
        words = "nobody knows what was lost"
    apart = "" if incident.counts_as == FAILURE else f", not counted: {incident.counts_as}"
    return words + apart


def seen_lines(facts: JobFacts) -> list[str]:
    """Return what was seen of devices, ranks, loaders and hot spots, a line each."""
    lines = [
        f"{event.device or 'the host'} of {event.host}: {event.action}"
        + (f", {event.reasons[0]}" if event.reasons else "")
        for event in facts.health
        if event.action in ("suspect", "migrate")
    ]
    lines += [f"{event.reason}, while {event.cause}" for event in facts.stragglers]
    lines += [f"a planned fault did not fire: {fault}" for fault in facts.unfired]
    if facts.guests:
        pairs = {p for e in facts.guests for p in zip(e.ranks, e.hosts, strict=True)}
        who = ", ".join(f"rank {rank} on that of rank {host}" for rank, host in sorted(pairs))
        lines.append(f"{duration(facts.reduced_s)} at reduced speed, on shared devices: {who}")
    lines += [
        f"a sample takes {event.sample_s * 1000:.0f} ms to load, mostly in {event.slowest};"
        f" rank {event.rank} waited {percent(event.waited_share)} of the time: prepare it offline"
        for event in facts.loaders
    ]
    if facts.hot_spots:
        last = facts.hot_spots[-1]
        spots = ", ".join(f"{name} {percent(share)}" for name, share in last.spots[:5])
        where = "the device" if last.on_device else "the processor"
        lines.append(f"hot spots on {where} in epoch {last.epoch}: {spots}")
    return lines


def steps_words(facts: JobFacts) -> str:
    """Return how long a step takes, what it waits for, and how busy devices are meanwhile."""
    if not facts.step_s:
        return "No step was measured"
    share = facts.loader_s / (facts.step_s + facts.loader_s)
    busy = "not known" if facts.device_use is None else percent(facts.device_use)
    return (
        f"A step takes {duration(facts.step_s)} and waits {duration(facts.loader_s)} for its batch "
        f"({percent(share)}); devices busy: {busy}"
    )


def _table(jobs: Sequence[JobReport]) -> list[str]:
    header = (
        "JOB", "PROJECT", "STARTED", "ELAPSED", "RANKS", "STEPS", "OUTCOME", "INCIDENTS", "ETTR",
        "COST", "SAVED",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for job in jobs:
        one = job.facts.summary
        rows.append(
            (
                one.job,
                one.project,
                when(one.started_wall_s),
                duration(job.time.elapsed_s),
                str(one.world_size),
                str(one.steps),
                one.outcome,
                str(len(job.incidents)),
                percent(job.time.ettr),
                usd(job.economics.cost_usd),
                usd(job.economics.saved_cost_usd),
            )  # fmt: skip
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _job(job: JobReport) -> list[str]:
    one, time = job.facts.summary, job.time
    lines = [
        f"Job {one.job}  {one.script}  (project {one.project}, {one.host})",
        f"  {one.outcome}"
        + (f", exit code {one.exit_code}" if one.exit_code is not None else "")
        + (f": {one.reason}" if one.reason else ""),
        (
            f"  began {when(one.started_wall_s)}, {duration(time.elapsed_s)}, "
            f"{count(one.world_size, 'rank')}, {count(one.spares, 'spare')}, "
            f"{count(one.steps, 'committed step')}"
        ),
        (
            f"  ETTR {percent(time.ettr)}, goodput {percent(time.goodput)}, "
            f"MFU {percent(time.mfu)}, {quantity(time.samples_per_s)} samples/s"
        ),
        f"  {steps_words(job.facts)}",
        "",
        "  Lost time by cause:",
    ]
    lines += [f"    {cause:<22}{duration(lost)}" for cause, lost in time.lost_s.items()]
    lines += ["", "  Incidents:" if job.incidents else "  No incidents."]
    for number, incident in enumerate(job.incidents, 1):
        lines.append(f"    {number}. {incident.sentence} [{mark(incident)}]")
    if seen := seen_lines(job.facts):
        lines += ["", "  Seen:", *(f"    {line}" for line in seen)]
    return [*lines, "", *_money(job)]


def _money(job: JobReport) -> list[str]:
    money = job.economics
    lines = [
        f"  Held {hours(money.gpu_hours)}, of it lost {hours(money.lost_gpu_hours)}, spares "
        + hours(money.spare_gpu_hours)
    ]
    if money.cost_usd is None:
        lines.append(f"  Money: {_NO_PRICE}")
    else:
        lines.append(
            f"  Cost {usd(money.cost_usd)}, of it lost {usd(money.lost_cost_usd)}, "
            f"spares {usd(money.spare_cost_usd)}"
        )
    lines.append(
        f"  Saved against restarts from the last checkpoint on disk: "
        f"{hours(money.saved_gpu_hours)}" + _in_usd(money.saved_cost_usd)
    )
    lines.append(
        f"  Saved by {count(len(job.facts.saved), 'stored result')}, less reading: "
        f"{duration(3600.0 * money.graph_saved_gpu_hours)} on one device"
        + _in_usd(money.graph_saved_cost_usd)
        + (f", about {money.graph_saved_j:,.0f} J by rated power" if money.graph_saved_j else "")
    )
    for lever, expected in money.expected_gpu_hours.items():
        lines.append(f"  Lever {lever}: {hours(expected)} saved, expected, not measured")
    lines.append(f"  Energy: {energy_words(money.energy)}")
    lines += [
        f"  Budget {one.budget}: crossed {percent(one.threshold)} of {one.limit:g} {one.metric} "
        f"at {when(one.wall_s)}, with {one.used:.4g}"
        for one in job.facts.crossed
    ]
    return lines


def _audits(job: JobReport) -> list[str]:
    lines = [f"Audit of job {job.facts.summary.job}:"]
    for one, incident in zip(job.economics.audits, job.facts.incidents, strict=True):
        lines += [
            f"  incident {one.incident}, step {one.step}; base: step {one.base_step} ({one.base})",
            (
                f"    without = detected {incident.detected_s:.6g} + restart {one.restart_s:.6g}"
                f" + ({one.step} - {one.base_step}) x step {one.step_s:.6g} = {one.without_s:.6g} s"
            ),
            (
                f"    with    = detected {incident.detected_s:.6g} + pause {incident.pause_s:.6g}"
                f" + {incident.steps_lost} x step {one.step_s:.6g} = {one.with_s:.6g} s"
            ),
            _audit_result(one, job.facts.summary.world_size),
        ]
    if not job.economics.audits:
        lines.append("  no incidents that the job reported")
    return [*lines, ""]


def _audit_result(one: Audit, world_size: int) -> str:
    if one.counts:
        return f"    saved   = 0: {one.counts}"
    return (
        f"    saved   = {one.without_s:.6g} - {one.with_s:.6g} = {one.saved_s:.6g} s"
        f" x {world_size} ranks / 3600 = {one.gpu_hours:.6g} GPU-h" + _in_usd(one.cost_usd)
    )


def _totals(title: str, totals: Totals) -> list[str]:
    lines = [
        (
            f"{title}: {count(totals.jobs, 'job')}, {hours(totals.gpu_hours)}, "
            f"ETTR {percent(totals.ettr)}, goodput {percent(totals.goodput)}, "
            f"MFU {percent(totals.mfu)}"
        ),
        (
            f"  lost {hours(totals.lost_gpu_hours)}{_in_usd(totals.lost_cost_usd)}, saved "
            f"{hours(totals.saved_gpu_hours)}{_in_usd(totals.saved_cost_usd)}, by stored results "
            f"{hours(totals.graph_saved_gpu_hours)}{_in_usd(totals.graph_saved_cost_usd)}"
        ),
    ]
    lines.append(
        f"  cost {usd(totals.cost_usd)}, of it spares {usd(totals.spare_cost_usd)}"
        if totals.cost_usd is not None
        else f"  money: {_NO_PRICE}"
    )
    if totals.facility_kwh is not None:
        carbon = "" if totals.co2_kg is None else f", {quantity(totals.co2_kg)} kg CO2e"
        kind = "estimated, at least in part" if totals.energy_is_estimate else "measured"
        rest = (
            f", {count(totals.jobs_without_energy, 'job')} without"
            if totals.jobs_without_energy
            else ""
        )
        lines.append(f"  energy {quantity(totals.facility_kwh)} kWh{carbon} ({kind}{rest})")
    return lines


def _in_usd(amount: float | None) -> str:
    return "" if amount is None else f" ({usd(amount)})"
