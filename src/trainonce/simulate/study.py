"""Many seeds, many sizes, many spares: what the simulator is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student_t

from trainonce.errors import ConfigError
from trainonce.simulate.failures import HOUR_S
from trainonce.simulate.job import simulate
from trainonce.simulate.outcome import TIME_PARTS, Outcome, cost_of

if TYPE_CHECKING:
    from trainonce.simulate.policies import Policy
    from trainonce.simulate.scenario import Scenario

# Called after each simulated job with how many are done, of how many, and what is next.
Progress = Callable[[int, int, str], None]

_YEAR_DAYS = 365.0
_CONFIDENCE = 0.95
# The cost of holding spares is convex but for noise: so many rises in a row end the search.
_RISES_TO_STOP = 4
# All jobs of one study: some ten minutes on one core. A job in which nothing happens takes as long
# as so many events.
MAX_STUDY_EVENTS = 200_000_000
_EVENTS_OF_A_JOB = 100


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds, with its 95 % confidence interval (Student's t)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean behind `values`, at least two."""
        array = np.asarray(values, dtype=np.float64)
        mean = float(array.mean())
        quantile = float(student_t.ppf((1 + _CONFIDENCE) / 2, len(array) - 1))
        half = quantile * float(array.std(ddof=1)) / len(array) ** 0.5
        return cls(mean=mean, low=mean - half, high=mean + half)

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one policy made of one scenario, over all seeds. Money is a year's, in US dollars.

    Args:
        spares: Idle nodes held.
        interval_s: Between checkpoints.
        hours: Mean hours a year by where the time went; keys as in `Outcome`, without `_s`.
        live_share: Share of the failures served with no lost progress.
        failures_by_cause: Mean number a year.
        ettr_by_seed: Behind `ettr`. Equal seeds saw equal failures under every policy.
        total_usd_by_seed: Behind `total_usd`.
    """

    policy: Policy
    num_gpus: int
    gpus_per_node: int
    mttf_h: float
    spares: int
    interval_s: float
    ettr: Estimate
    wasted_usd: Estimate
    spares_usd: Estimate
    total_usd: Estimate
    failures: Estimate
    live_share: Estimate
    false_alarms: Estimate
    waits_for_spare: Estimate
    hours: dict[str, float]
    failures_by_cause: dict[str, float]
    ettr_by_seed: list[float]
    total_usd_by_seed: list[float]

    def to_record(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class SpareStudy:
    """How many spares pay off for one policy.

    Args:
        results: One for each number of spares, from 0 up.
        best: The one with the least total cost.
        closed_form: The newsvendor's answer, `theory.spares_that_pay`.
    """

    results: list[Result]
    best: Result
    closed_form: int

    def to_record(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "best_spares": self.best.spares,
            "closed_form_spares": self.closed_form,
            "results": [result.to_record() for result in self.results],
        }


def expected_events(scenario: Scenario, policies: Sequence[Policy], num_seeds: int) -> float:
    """Return what simulating each policy once for each seed costs, in events."""
    each = (scenario.expected_events(policy) + _EVENTS_OF_A_JOB for policy in policies)
    return num_seeds * sum(each)


def check_size(events: float) -> None:
    """Raise unless so many events can be simulated while somebody waits for them.

    Raises:
        ConfigError: They are too many.
    """
    if events > MAX_STUDY_EVENTS:
        raise ConfigError(
            f"{events:.3g} failures and alarms are expected in all jobs together; "
            f"{MAX_STUDY_EVENTS:,} can be simulated, some ten minutes' work",
            hint=f"take {MAX_STUDY_EVENTS / events:.1%} of the days or seeds, fewer policies or "
            "sizes, or check the rates",
        )


def run_policy(
    scenario: Scenario, policy: Policy, seeds: Sequence[int], progress: Progress | None = None
) -> Result:
    """Simulate `policy` once for each seed.

    Raises:
        ConfigError: There are fewer than two seeds, so there would be no interval; or more would
            happen than can be simulated.
    """
    check_size(expected_events(scenario, [policy], len(seeds)))
    if len(seeds) < 2:
        raise ConfigError(
            f"{len(seeds)} seed gives no interval", hint="take at least --seeds 2; 16 is usual"
        )
    outcomes: list[Outcome] = []
    for done, seed in enumerate(seeds):
        if progress:
            progress(done, len(seeds), f"{policy.name} on {scenario.num_gpus} GPUs")
        outcomes.append(simulate(scenario, policy, seed))
    return _summarise(scenario, policy, outcomes)


def _summarise(scenario: Scenario, policy: Policy, outcomes: list[Outcome]) -> Result:
    spares = scenario.spares_for(policy)
    yearly = _YEAR_DAYS / scenario.days
    costs = [cost_of(outcome, scenario, spares) for outcome in outcomes]

    def count(name: str) -> Estimate:
        return Estimate.of([getattr(outcome, name) * yearly for outcome in outcomes])

    return Result(
        policy=policy,
        num_gpus=scenario.num_gpus,
        gpus_per_node=scenario.gpus_per_node,
        mttf_h=scenario.mttf_s / HOUR_S,
        spares=spares,
        interval_s=scenario.interval_s(policy),
        ettr=Estimate.of([outcome.ettr for outcome in outcomes]),
        wasted_usd=Estimate.of([cost.wasted_usd * yearly for cost in costs]),
        spares_usd=Estimate.of([cost.spares_usd * yearly for cost in costs]),
        total_usd=Estimate.of([cost.total_usd * yearly for cost in costs]),
        failures=count("failures"),
        live_share=Estimate.of([outcome.live_share for outcome in outcomes]),
        false_alarms=count("false_alarms"),
        waits_for_spare=count("waits_for_spare"),
        hours={part.removesuffix("_s"): count(part).mean / HOUR_S for part in TIME_PARTS},
        failures_by_cause={
            name: float(np.mean([o.failures_by_cause[name] for o in outcomes])) * yearly
            for name in outcomes[0].failures_by_cause
        },
        ettr_by_seed=[outcome.ettr for outcome in outcomes],
        total_usd_by_seed=[cost.total_usd * yearly for cost in costs],
    )


def sweep(
    scenario: Scenario,
    policies: Sequence[Policy],
    sizes: Sequence[int],
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[Result]:
    """Run every policy at every number of GPUs in `sizes`, sizes outermost.

    Raises:
        ConfigError: More would happen than can be simulated.
    """
    scenarios = [dataclasses.replace(scenario, num_gpus=num_gpus) for num_gpus in sizes]
    check_size(sum(expected_events(sized, policies, len(seeds)) for sized in scenarios))
    results: list[Result] = []
    total = len(scenarios) * len(policies) * len(seeds)
    for sized in scenarios:
        for policy in policies:
            before = len(results) * len(seeds)
            results.append(run_policy(sized, policy, seeds, _shifted(progress, before, total)))
    return results


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _, label: progress(before + done, total, label)


def _closed_form(scenario: Scenario, policy: Policy) -> int:
    return dataclasses.replace(scenario, spares=None, spares_share=None).spares_for(policy)


def expected_search_events(scenario: Scenario, policies: Sequence[Policy], num_seeds: int) -> float:
    """Return what `find_spares` is likely to cost for each of the policies, in events."""
    events = 0.0
    for policy in policies:
        num_tried = _closed_form(scenario, policy) + 1 + _RISES_TO_STOP
        held = dataclasses.replace(scenario, spares=num_tried // 2)  # in the mean
        events += num_tried * expected_events(held, [policy], num_seeds)
    return events


def find_spares(
    scenario: Scenario, policy: Policy, seeds: Sequence[int], progress: Progress | None = None
) -> SpareStudy:
    """Hold 0, 1, 2, ... idle spares until one more no longer pays.

    All numbers of spares see the same failures, so that their differences are not luck.

    Raises:
        ConfigError: The policy borrows its spares, so it holds none; or more would happen than can
            be simulated.
    """
    if policy.spare_source != "idle":
        raise ConfigError(
            f"policy {policy.name!r} borrows its spares and holds none",
            hint="ask for a policy with idle spares",
        )
    closed_form = _closed_form(scenario, policy)
    check_size(expected_search_events(scenario, [policy], len(seeds)))
    results: list[Result] = []
    best: Result | None = None
    events = 0.0
    # The closed form tells where the search is likely to end; the progress shown goes by it.
    total = (closed_form + 1 + _RISES_TO_STOP) * len(seeds)
    while best is None or len(results) <= best.spares + _RISES_TO_STOP:
        before = len(results) * len(seeds)
        held = dataclasses.replace(scenario, spares=len(results))
        events += expected_events(held, [policy], len(seeds))
        check_size(events)
        step = _shifted(progress, before, max(total, before + len(seeds)))
        result = run_policy(held, policy, seeds, step)
        results.append(result)
        if best is None or result.total_usd.mean < best.total_usd.mean:
            best = result
    return SpareStudy(results=results, best=best, closed_form=closed_form)
