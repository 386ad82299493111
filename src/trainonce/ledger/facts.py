"""The events of one job, sorted into what the accounts need."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from trainonce.events import (
    BudgetCrossed,
    CheckpointSaved,
    ComputeSaved,
    EnergyUsed,
    Event,
    FaultInjected,
    GenerationFormed,
    GuestsChanged,
    HealthChanged,
    HotSpots,
    Incident,
    JobEnded,
    JobStarted,
    LeverApplied,
    LoaderSlow,
    ProgressMade,
    StragglerFound,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trainonce.ledger.reading import JobSummary


_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What the ledger knows of one job.

    Args:
        summary: The job in a line.
        started_wall_s: When it began.
        started_mono_s: The same on its host's monotonic clock; 0 where not known.
        elapsed_s: From the beginning to the end; for a running job until now, for a lost one
            until its last word. On the monotonic clock where both ends have one.
        formed_s: Seconds from the beginning to the first generation being consistent; None
            where that never came.
        start_step: Committed steps that the job began with (0 unless resumed).
        end_step: Committed steps at the last word.
        step_s: Median duration of a step over the samples of progress; 0 where unknown.
        loader_s: Median over those samples of what a step waited for its batch.
        device_use: Mean share of the time in which devices were busy; None where not known.
        flops_per_step: Median operations of a step, all ranks; 0 where the script counts none.
        peak_flops: Operations a second that the ranks' devices can do; 0 where not known.
        samples: Samples consumed at the last word.
        tokens: Tokens consumed at the last word.
        resumed_from: Folder of the checkpoint the job began from, or "".
        supported: The script calls `trainonce.init()`, as far as is known.
        incidents: In order.
        checkpoints: In order.
        faults: Chaos that fired.
        unfired: Chaos that was planned and did not.
        saved: First use of each stored result.
        energy: Readings.
        levers: Levers that were on.
        crossed: Thresholds of budgets that were crossed and told of.
        health: Verdicts on devices as they changed.
        stragglers: Ranks that were found to be slow.
        loaders: Loaders that were found to be slow.
        hot_spots: Light profiles.
        guests: Ranks that were on the device of another rank, as that changed.
        reduced_s: Seconds in which some rank was.
        progress: (seconds since the start, committed steps), in order, for plots.
    """

    summary: JobSummary
    started_wall_s: float
    started_mono_s: float
    elapsed_s: float
    formed_s: float | None
    start_step: int
    end_step: int
    step_s: float
    loader_s: float
    device_use: float | None
    flops_per_step: float
    peak_flops: float
    samples: int
    tokens: int
    resumed_from: str
    supported: bool
    incidents: list[Incident]
    checkpoints: list[CheckpointSaved]
    faults: list[FaultInjected]
    saved: list[ComputeSaved]
    energy: list[EnergyUsed]
    levers: list[LeverApplied]
    crossed: list[BudgetCrossed]
    progress: list[tuple[float, int]]
    health: list[HealthChanged] = field(default_factory=lambda: [])
    stragglers: list[StragglerFound] = field(default_factory=lambda: [])
    loaders: list[LoaderSlow] = field(default_factory=lambda: [])
    hot_spots: list[HotSpots] = field(default_factory=lambda: [])
    guests: list[GuestsChanged] = field(default_factory=lambda: [])
    reduced_s: float = 0.0
    unfired: list[str] = field(default_factory=lambda: [])

    @property
    def num_gpus(self) -> int:
        """Devices the job held: its ranks and its spares."""
        return self.summary.world_size + self.summary.spares

    @property
    def gpu_hours(self) -> float:
        """Device hours that the job held, spares included."""
        return self.num_gpus * self.elapsed_s / 3600.0


def gather(summary: JobSummary, events: Iterable[Event], now_wall_s: float) -> JobFacts:
    """Return the facts in `events`, those of the job in `summary`."""
    found: dict[type[Event], list[Event]] = {}
    last: Event | None = None
    for event in events:
        found.setdefault(type(event), []).append(event)
        heard = not isinstance(event, BudgetCrossed)  # others write those, also after the end
        if heard and (last is None or event.wall_s >= last.wall_s):
            last = event
    starts = _of(found, JobStarted)
    start = starts[0] if starts else None
    begun = start or Event(wall_s=summary.started_wall_s)
    ends = _of(found, JobEnded)
    formed = _of(found, GenerationFormed)
    progress = _of(found, ProgressMade)
    if summary.outcome == "running":
        elapsed_s = max(0.0, now_wall_s - summary.started_wall_s)
    else:
        elapsed_s = _between(begun, ends[-1] if ends else last or begun)
    stepped = [event for event in progress if event.step_s > 0]
    used = [event.device_use for event in progress if event.device_use is not None]
    return JobFacts(
        summary=summary,
        started_wall_s=summary.started_wall_s,
        started_mono_s=begun.mono_s,
        elapsed_s=elapsed_s,
        formed_s=_between(begun, formed[0]) if formed else None,
        start_step=formed[0].step if formed else 0,
        end_step=summary.steps,
        step_s=_median(event.step_s for event in stepped),
        loader_s=_median(event.loader_s for event in stepped),
        device_use=statistics.fmean(used) if used else None,
        flops_per_step=_median(e.flops_per_step for e in stepped if e.flops_per_step > 0),
        peak_flops=_median(event.peak_flops for event in stepped if event.peak_flops > 0),
        samples=progress[-1].samples if progress else 0,
        tokens=progress[-1].tokens if progress else 0,
        resumed_from=start.resumed_from if start else "",
        supported=all(event.supported for event in (*ends, *_of(found, Incident))),
        incidents=_of(found, Incident),
        checkpoints=_of(found, CheckpointSaved),
        faults=_of(found, FaultInjected),
        saved=list({event.key: event for event in reversed(_of(found, ComputeSaved))}.values()),
        energy=_of(found, EnergyUsed),
        levers=list({event.lever: event for event in _of(found, LeverApplied)}.values()),
        crossed=_of(found, BudgetCrossed),
        progress=[(_between(begun, event), event.step) for event in progress],
        health=_of(found, HealthChanged),
        stragglers=_of(found, StragglerFound),
        loaders=_of(found, LoaderSlow),
        hot_spots=_of(found, HotSpots),
        guests=_of(found, GuestsChanged),
        reduced_s=_reduced_s(begun, _of(found, GuestsChanged), elapsed_s),
        unfired=ends[-1].unfired if ends else [],
    )


def _reduced_s(begun: Event, changes: list[GuestsChanged], elapsed_s: float) -> float:
    times = [_between(begun, event) for event in changes]
    ends = [*times[1:], elapsed_s]
    return sum(
        max(0.0, end_s - begin_s)
        for event, begin_s, end_s in zip(changes, times, ends, strict=False)
        if event.ranks
    )


def since_start(facts: JobFacts, event: Event) -> float:
    """Return seconds from the job's beginning to `event`."""
    begun = Event(wall_s=facts.started_wall_s, mono_s=facts.started_mono_s)
    return _between(begun, event)


def _median(values: Iterable[float]) -> float:
    return statistics.median([*values] or [0.0])


def _of(found: dict[type[Event], list[Event]], cls: type[_E]) -> list[_E]:
    return [event for event in found.get(cls, []) if isinstance(event, cls)]


def _between(first: Event, second: Event) -> float:
    # A wall clock may be set while a job runs. The monotonic one is not, and events of one
    # job come from one host.
    if first.mono_s and second.mono_s >= first.mono_s:
        return second.mono_s - first.mono_s
    return max(0.0, second.wall_s - first.wall_s)
