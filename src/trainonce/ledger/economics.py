"""What a job cost, what failures cost, and what was saved; formulae in docs/ledger.md.

Every figure follows from events and `Prices` alone, so anyone can compute it again:
`trainonce report --audit` prints the inputs and the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.ledger.facts import since_start
from trainonce.ledger.guarantee import FAILURE, classify

if TYPE_CHECKING:
    from trainonce.events import Incident
    from trainonce.ledger.account import TimeAccount
    from trainonce.ledger.facts import JobFacts
    from trainonce.ledger.prices import Prices

_J_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One incident against a restart from the last checkpoint that was on disk.

    Args:
        incident: Its number in the job.
        step: Committed steps when it happened.
        base_step: Step of the last checkpoint committed before it, else the first step.
        base: What that was: the checkpoint's path, or "start of the job".
        step_s: Median step time of the job.
        restart_s: Start-up time of this job.
        without_s: detected_s + restart_s + (step - base_step) * step_s.
        with_s: detected_s + pause_s + steps_lost * step_s.
        saved_s: without_s - with_s where it counts, else 0.
        gpu_hours: saved_s * world_size / 3600.
        cost_usd: gpu_hours * usd_per_gpu_hour; None without a price.
        counts: Why it counts or does not, in a phrase; "" where it counts.
    """

    incident: int
    step: int
    base_step: int
    base: str
    step_s: float
    restart_s: float
    without_s: float
    with_s: float
    saved_s: float
    gpu_hours: float
    cost_usd: float | None
    counts: str


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy and its carbon.

    Args:
        it_kwh: What the devices used; None where it was neither measured nor estimated.
        is_estimate: Some of it was not measured.
        source: "nvml", "rapl", "tdp", a list of these, or "".
        facility_kwh: it_kwh * PUE.
        co2_kg: facility_kwh * carbon intensity; None without an intensity.
    """

    it_kwh: float | None = None
    is_estimate: bool = False
    source: str = ""
    facility_kwh: float | None = None
    co2_kg: float | None = None


@dataclass(frozen=True, kw_only=True)
class Economics:
    """The money and energy of one job.

    Args:
        gpu_hours: Device hours held, spares included.
        spare_gpu_hours: The spares' part of them.
        lost_gpu_hours: Lost seconds (ETTR) times ranks.
        cost_usd: gpu_hours * price, as the three that follow; None without a price.
        spare_cost_usd: What holding the spares cost.
        lost_cost_usd: What lost time cost.
        saved_gpu_hours: By surviving failures: the sum of `audits`.
        saved_cost_usd: That in money.
        graph_saved_gpu_hours: By stored results less the time to read them, first use each.
        graph_saved_cost_usd: That in money.
        graph_saved_j: That in joules, at the rated power of the devices: an estimate.
        expected_gpu_hours: What levers are expected to have saved. Expected, not measured:
            never part of a sum.
        energy: Of the job.
        saved_energy: saved_gpu_hours at the job's mean power per device: an estimate.
        audits: One for each incident.
    """

    gpu_hours: float
    spare_gpu_hours: float
    lost_gpu_hours: float
    cost_usd: float | None
    spare_cost_usd: float | None
    lost_cost_usd: float | None
    saved_gpu_hours: float
    saved_cost_usd: float | None
    graph_saved_gpu_hours: float
    graph_saved_cost_usd: float | None
    graph_saved_j: float
    expected_gpu_hours: dict[str, float]
    energy: Energy
    saved_energy: Energy
    audits: list[Audit]


def economics(facts: JobFacts, time: TimeAccount, prices: Prices) -> Economics:
    """Return what the job cost and saved."""
    audits = audit(facts, prices)
    saved_gpu_hours = sum(one.gpu_hours for one in audits)
    graph_gpu_hours = sum(one.saved_s - one.read_s for one in facts.saved) / 3600.0
    lost_gpu_hours = sum(time.lost_s.values()) * facts.summary.world_size / 3600.0
    spare_gpu_hours = facts.summary.spares * facts.elapsed_s / 3600.0
    used = energy_used(facts, prices)
    productive_gpu_hours = time.productive_s * facts.summary.world_size / 3600.0
    return Economics(
        gpu_hours=facts.gpu_hours,
        spare_gpu_hours=spare_gpu_hours,
        lost_gpu_hours=lost_gpu_hours,
        cost_usd=_usd(facts.gpu_hours, prices),
        spare_cost_usd=_usd(spare_gpu_hours, prices),
        lost_cost_usd=_usd(lost_gpu_hours, prices),
        saved_gpu_hours=saved_gpu_hours,
        saved_cost_usd=_usd(saved_gpu_hours, prices),
        graph_saved_gpu_hours=graph_gpu_hours,
        graph_saved_cost_usd=_usd(graph_gpu_hours, prices),
        graph_saved_j=sum(one.energy_j for one in facts.saved),
        expected_gpu_hours={
            # A share s saved leaves 1 - s of the work, which is what was measured.
            one.lever: productive_gpu_hours * one.expected_share / (1.0 - one.expected_share)
            for one in facts.levers
            if 0.0 <= one.expected_share < 1.0
        },
        energy=used,
        saved_energy=_scaled(used, saved_gpu_hours, facts.gpu_hours, prices),
        audits=audits,
    )


def audit(facts: JobFacts, prices: Prices) -> list[Audit]:
    """Return each incident of the job against a restart from the last checkpoint on disk.

    A saving counts for unplanned failures that were served; of several at the same step
    only the first counts, since one restart would have served them all.
    """
    found: list[Audit] = []
    seen: set[int] = set()
    for incident in facts.incidents:
        reason = _why_not(incident, seen)
        if not reason:
            seen.add(incident.step)
        found.append(_audit_one(facts, incident, prices, reason))
    return found


def energy_used(facts: JobFacts, prices: Prices) -> Energy:
    """Return the job's energy: as measured, else from `gpu_tdp_w` and labelled an estimate."""
    if facts.energy:
        joules = sum(one.energy_j for one in facts.energy)
        sources = sorted({one.source for one in facts.energy})
        estimate = any(one.is_estimate for one in facts.energy)
        return _energy(joules / _J_PER_KWH, estimate, ", ".join(sources), prices)
    if prices.gpu_tdp_w is None:
        return Energy()
    return _energy(facts.gpu_hours * prices.gpu_tdp_w / 1000.0, True, "tdp", prices)


def _why_not(incident: Incident, seen: set[int]) -> str:
    kind = classify(incident)
    if kind != FAILURE:
        return kind
    if incident.served_by == "none":
        return "not served"
    if incident.step in seen:
        return "same step as an earlier one"
    return ""


def _audit_one(facts: JobFacts, incident: Incident, prices: Prices, reason: str) -> Audit:
    base_step, base = facts.start_step, "start of the job"
    failed_s = since_start(facts, incident)
    for checkpoint in facts.checkpoints:
        if since_start(facts, checkpoint) <= failed_s and checkpoint.step >= base_step:
            base_step, base = checkpoint.step, checkpoint.path
    restart_s = facts.formed_s or 0.0
    redone = max(0, incident.step - base_step)
    without_s = incident.detected_s + restart_s + redone * facts.step_s
    with_s = incident.detected_s + incident.pause_s + incident.steps_lost * facts.step_s
    saved_s = 0.0 if reason else without_s - with_s
    gpu_hours = saved_s * facts.summary.world_size / 3600.0
    return Audit(
        incident=incident.incident,
        step=incident.step,
        base_step=base_step,
        base=base,
        step_s=facts.step_s,
        restart_s=restart_s,
        without_s=without_s,
        with_s=with_s,
        saved_s=saved_s,
        gpu_hours=gpu_hours,
        cost_usd=_usd(gpu_hours, prices),
        counts=reason,
    )


def _usd(gpu_hours: float, prices: Prices) -> float | None:
    return None if prices.usd_per_gpu_hour is None else gpu_hours * prices.usd_per_gpu_hour


def _energy(it_kwh: float, estimate: bool, source: str, prices: Prices) -> Energy:
    facility_kwh = it_kwh * prices.pue
    intensity = prices.intensity_g_per_kwh
    return Energy(
        it_kwh=it_kwh,
        is_estimate=estimate,
        source=source,
        facility_kwh=facility_kwh,
        co2_kg=None if intensity is None else facility_kwh * intensity / 1000.0,
    )


def _scaled(used: Energy, part: float, whole: float, prices: Prices) -> Energy:
    if used.it_kwh is None or whole <= 0:
        return Energy()
    return _energy(used.it_kwh * part / whole, True, used.source, prices)
