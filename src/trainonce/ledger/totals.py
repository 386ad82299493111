"""Sums over jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.ledger.report import JobReport


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over jobs. Ratios are weighted by ranks times seconds; None where unknown."""

    jobs: int
    gpu_hours: float
    ettr: float | None
    goodput: float | None
    mfu: float | None
    lost_gpu_hours: float
    lost_gpu_hours_by_cause: dict[str, float]
    cost_usd: float | None
    lost_cost_usd: float | None
    spare_cost_usd: float | None
    saved_gpu_hours: float
    saved_cost_usd: float | None
    graph_saved_gpu_hours: float
    graph_saved_cost_usd: float | None
    graph_saved_j: float
    it_kwh: float | None
    facility_kwh: float | None
    co2_kg: float | None
    energy_is_estimate: bool
    jobs_without_energy: int


def total(jobs: Sequence[JobReport]) -> Totals:
    """Add up the jobs."""
    money = [one.economics for one in jobs]
    energies = [one.energy for one in money if one.energy.it_kwh is not None]
    by_cause: dict[str, float] = {}
    for one in jobs:
        for cause, lost_s in one.time.lost_s.items():
            lost = lost_s * one.facts.summary.world_size / 3600.0
            by_cause[cause] = by_cause.get(cause, 0.0) + lost
    return Totals(
        jobs=len(jobs),
        gpu_hours=sum(one.gpu_hours for one in money),
        ettr=_weighted(jobs, [one.time.ettr for one in jobs]),
        goodput=_weighted(jobs, [one.time.goodput for one in jobs]),
        mfu=_weighted(jobs, [one.time.mfu for one in jobs]),
        lost_gpu_hours=sum(one.lost_gpu_hours for one in money),
        lost_gpu_hours_by_cause=by_cause,
        cost_usd=_sum([one.cost_usd for one in money]),
        lost_cost_usd=_sum([one.lost_cost_usd for one in money]),
        spare_cost_usd=_sum([one.spare_cost_usd for one in money]),
        saved_gpu_hours=sum(one.saved_gpu_hours for one in money),
        saved_cost_usd=_sum([one.saved_cost_usd for one in money]),
        graph_saved_gpu_hours=sum(one.graph_saved_gpu_hours for one in money),
        graph_saved_cost_usd=_sum([one.graph_saved_cost_usd for one in money]),
        graph_saved_j=sum(one.graph_saved_j for one in money),
        it_kwh=_sum([one.it_kwh for one in energies]),
        facility_kwh=_sum([one.facility_kwh for one in energies]),
        co2_kg=_sum([one.co2_kg for one in energies]),
        energy_is_estimate=any(one.is_estimate for one in energies),
        jobs_without_energy=len(jobs) - len(energies),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    """Add up; None where there is nothing to add or a part is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _weighted(jobs: Sequence[JobReport], values: Sequence[float | None]) -> float | None:
    weight = total = 0.0
    for job, value in zip(jobs, values, strict=True):
        if value is not None:
            share = job.facts.summary.world_size * job.time.elapsed_s
            weight += share
            total += share * value
    return total / weight if weight else None
