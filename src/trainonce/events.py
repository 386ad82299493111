"""The typed records that every part reports.

The ledger knows these, and not the parts that emit them. An event is a
frozen dataclass of plain values; `to_record` and `from_record` carry it as JSON. Adding a
field with a default keeps old ledgers readable; renaming or removing one needs a new kind.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trainonce.errors import LedgerError


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Args:
        wall_s: When it happened, seconds since the epoch on the reporting host.
        mono_s: The same instant on that host's monotonic clock.
    """

    kind: ClassVar[str] = "event"
    wall_s: float = 0.0
    mono_s: float = 0.0

    def to_record(self) -> dict[str, Any]:
        """Return the event as plain values, its kind included."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """A job begins."""

    kind: ClassVar[str] = "job_started"
    job: str
    script: str
    command: list[str]
    world_size: int
    spares: int
    host: str
    project: str = "default"
    versions: dict[str, str] = field(default_factory=lambda: {})
    resumed_from: str = ""


@dataclass(frozen=True, kw_only=True)
class JobEnded(Event):
    """A job is over.

    Args:
        outcome: "completed", "failed", "interrupted" or "lost".
        exit_code: The launcher's.
        steps: Committed steps.
        reason: Why it ended so.
        supported: The script called `trainonce.init()`; nothing is known of a plain script's time.
        unfired: Faults of the plan that did not fire, as entries of a plan.
    """

    kind: ClassVar[str] = "job_ended"
    outcome: str
    exit_code: int
    steps: int
    reason: str = ""
    supported: bool = True
    unfired: list[str] = field(default_factory=lambda: [])


@dataclass(frozen=True, kw_only=True)
class GenerationFormed(Event):
    """All ranks are consistent in a new generation."""

    kind: ClassVar[str] = "generation_formed"
    generation: int
    incarnation: int
    pids: list[int]
    newcomers: list[int]
    step: int


@dataclass(frozen=True, kw_only=True)
class Incident(Event):
    """A failure, a move or a false alarm, and how it was served. Its time is that of detection.

    Args:
        incident: Counts from 1 within the job.
        ranks: Which ranks it hit.
        cause: "signal", "exit", "exception", "misuse" (an exception of ours about how the script
            uses the package), "recovery" (one of ours that ended a rank's rebuild), "hang",
            "oom", "connection", "corruption", "migration", "launcher".
        detail: One phrase: "SIGKILL", "exit code 1", "no progress for 12.0 s".
        detected_by: "process exit", "progress", "stopped process", "collective", "request",
            "digest", "health", "drain", "capacity".
        served_by: "migration", "rebuild", "guest" (a rebuild on the device of another rank),
            "predecessor" (the worker that a move had drained went on), "shadow", "reform",
            "mirror", "checkpoint", "restart", "repair" or "none" where the job ended.
        planned: A move that was asked for.
        chaos: Injected by a fault plan.
        step: Committed steps of the job when it happened.
        detected_s: From the last sign of life to detection, seconds.
        pause_s: From detection to the first rank's next committed step, seconds.
        recovery_s: From detection until all ranks were consistent again, seconds.
        steps_lost: Committed steps that had to be computed again.
        micro_batches_recomputed: Shares of a step in flight that were computed again.
        bytes_moved: Bytes of state moved.
        digest_before: Digest of the replicated state as the donor gave it.
        digest_after: The same as the newcomer received it.
        waited_for_spare_s: Part of the pause spent waiting for a worker to start, or for a
            device to start it on.
        host: Where it happened.
        pids: Of the processes that it hit.
        supported: The script calls `trainonce.init()`. A plain script is restarted as a whole, and
            nobody knows what it loses.
    """

    kind: ClassVar[str] = "incident"
    incident: int
    ranks: list[int]
    cause: str
    detail: str
    detected_by: str
    served_by: str
    step: int
    generation: int
    planned: bool = False
    chaos: bool = False
    detected_s: float = 0.0
    pause_s: float = 0.0
    recovery_s: float = 0.0
    steps_lost: int = 0
    micro_batches_recomputed: int = 0
    bytes_moved: int = 0
    digest_before: str = ""
    digest_after: str = ""
    waited_for_spare_s: float = 0.0
    host: str = ""
    pids: list[int] = field(default_factory=lambda: [])
    supported: bool = True


@dataclass(frozen=True, kw_only=True)
class GuestsChanged(Event):
    """Which ranks share a device with another rank has changed: steps take longer meanwhile.

    Args:
        ranks: The guests; empty once every rank has a device of its own again.
        hosts: The rank on whose device each of them is.
        step: Committed steps of the job.
    """

    kind: ClassVar[str] = "guests_changed"
    ranks: list[int]
    hosts: list[int]
    step: int


@dataclass(frozen=True, kw_only=True)
class FaultInjected(Event):
    """A fault of the chaos plan fired."""

    kind: ClassVar[str] = "fault_injected"
    fault: str
    rank: int
    step: int
    point: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class ProgressMade(Event):
    """A sample of the job's progress, every few seconds and at the end.

    Args:
        step: Committed steps.
        samples: Consumed by committed steps, all ranks.
        tokens: The same.
        ranks_alive: Ranks that run.
        spares_ready: Spares that stand ready.
        step_s: Median duration of the latest steps.
        loss: Mean over the ranks that recorded one.
        loader_s: Seconds that the last step waited for its batch, on the rank that waited longest.
        device_use: Mean share of the time in which the ranks' devices were busy; None where no
            source of health signals tells.
        flops_per_step: Operations of a step, all ranks; 0 where the script does not count them.
        peak_flops: Operations a second that the ranks' devices can do; 0 where not known.
    """

    kind: ClassVar[str] = "progress"
    step: int
    samples: int
    tokens: int
    ranks_alive: int
    spares_ready: int
    step_s: float
    loss: float | None = None
    loader_s: float = 0.0
    device_use: float | None = None
    flops_per_step: int = 0
    peak_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class HealthChanged(Event):
    """The verdict on a device or a host has changed.

    Args:
        host: Whose.
        device: "gpu3", or "" for the host itself.
        action: "none", "note", "suspect" or "migrate".
        reasons: The most urgent first.
        ranks: Ranks of the job on that device.
    """

    kind: ClassVar[str] = "health_changed"
    host: str
    device: str
    action: str
    reasons: list[str]
    ranks: list[int]


@dataclass(frozen=True, kw_only=True)
class StragglerFound(Event):
    """A rank is slower than the others.

    Args:
        rank: Which one.
        host: Where it runs.
        step: Committed steps when it was found.
        slower: By which share it takes longer than the median rank before its collectives.
        excess_s: The same in seconds a step.
        cause: "loading" or "computing": where most of the excess is.
        reason: The evidence in words.
    """

    kind: ClassVar[str] = "straggler_found"
    rank: int
    host: str
    step: int
    slower: float
    excess_s: float
    cause: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoaderSlow(Event):
    """Samples take long to load, and are waited for.

    Args:
        rank: Who noticed.
        sample_s: Seconds a sample, in the process that loads it.
        waited_share: Share of the time in which this rank waited for batches.
        slowest: The function in which most of it is spent.
    """

    kind: ClassVar[str] = "loader_slow"
    rank: int
    sample_s: float
    waited_share: float
    slowest: str


@dataclass(frozen=True, kw_only=True)
class HotSpots(Event):
    """Where the time of a few steps went.

    Args:
        rank: Who was profiled.
        step: Steps that its worker had committed at the end of the profile.
        steps: Steps in the profile.
        seconds: Its length.
        epoch: Which epoch.
        on_device: Shares are of the device's time, not of the processor's.
        spots: Name and share of the time spent in it alone, the largest first.
    """

    kind: ClassVar[str] = "hot_spots"
    rank: int
    step: int
    steps: int
    seconds: float
    epoch: int
    on_device: bool
    spots: list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class SpareParked(Event):
    """A spare waits for a rank."""

    kind: ClassVar[str] = "spare_parked"
    worker: int
    pid: int
    where: str
    rehearsed: int
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A durable checkpoint was committed."""

    kind: ClassVar[str] = "checkpoint_saved"
    path: str
    step: int
    size_bytes: int
    blocked_s: float
    write_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSkipped(Event):
    """A damaged or half-written checkpoint was passed over."""

    kind: ClassVar[str] = "checkpoint_skipped"
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReplicasDiffer(Event):
    """Replicated state was not equal on all ranks.

    `repaired_from` is the rank whose copy was taken, or -1 where there was no majority.
    """

    kind: ClassVar[str] = "replicas_differ"
    step: int
    odd_ranks: list[int]
    names: list[str]
    repaired_from: int


@dataclass(frozen=True, kw_only=True)
class ValueLost(Event):
    """The return value of a committed step went down with its process."""

    kind: ClassVar[str] = "value_lost"
    rank: int
    step: int


@dataclass(frozen=True, kw_only=True)
class ComputeSaved(Event):
    """A stored result was used instead of computing it again."""

    kind: ClassVar[str] = "compute_saved"
    node: str
    key: str
    saved_s: float
    read_s: float
    energy_j: float = 0.0
    energy_is_estimate: bool = True


@dataclass(frozen=True, kw_only=True)
class EnergyUsed(Event):
    """Energy the job's devices used since the last such event, or since the job began.

    Args:
        energy_j: Joules.
        source: "nvml", "rapl" or "tdp".
        is_estimate: It was not measured.
    """

    kind: ClassVar[str] = "energy_used"
    energy_j: float
    source: str
    is_estimate: bool


@dataclass(frozen=True, kw_only=True)
class LeverApplied(Event):
    """A lever is on, and which share of the job's compute it is expected to save.

    `basis` says where the expectation comes from: a committed benchmark, for one.
    """

    kind: ClassVar[str] = "lever_applied"
    lever: str
    expected_share: float
    basis: str


@dataclass(frozen=True, kw_only=True)
class BudgetCrossed(Event):
    """What a job has used crossed a threshold of a budget; `metric` as in the budget."""

    kind: ClassVar[str] = "budget_crossed"
    budget: str
    metric: str
    limit: float
    threshold: float
    used: float


_KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        JobStarted, JobEnded, GenerationFormed, Incident, FaultInjected, ProgressMade,
        SpareParked, CheckpointSaved, CheckpointSkipped, ReplicasDiffer, ValueLost,
        ComputeSaved, EnergyUsed, LeverApplied, BudgetCrossed, HealthChanged,
        StragglerFound, LoaderSlow, HotSpots, GuestsChanged,
    )
}  # fmt: skip


def from_record(record: dict[str, Any]) -> Event:
    """Return the event in `record`.

    Raises:
        LedgerError: Its kind is unknown, or its fields do not fit.
    """
    values = dict(record)
    kind = values.pop("kind", None)
    cls = _KINDS.get(str(kind))
    if cls is None:
        raise LedgerError(f"unknown event kind {kind!r}", hint="a newer version wrote this ledger")
    try:
        return cls(**values)
    except TypeError as error:
        raise LedgerError(f"event {kind!r} has other fields than expected: {error}") from error
