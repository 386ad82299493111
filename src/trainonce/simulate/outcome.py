"""What one simulated job did with its time, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainonce.simulate.failures import HOUR_S

if TYPE_CHECKING:
    from trainonce.simulate.scenario import Scenario

# Where the time of a job can go. The parts add up to its duration.
TIME_PARTS = (
    "productive_s", "lost_s", "checkpoint_s", "detect_s", "wait_s", "recover_s", "degraded_s",
)  # fmt: skip


@dataclass(kw_only=True)
class Outcome:
    """Where the time of one job went.

    Args:
        productive_s: Computation that was kept.
        lost_s: Computation that had to be done again.
        checkpoint_s: Standing still for checkpoints.
        detect_s: From failures to their detection.
        wait_s: Waiting for a spare, or for a parked job to give one up.
        recover_s: Restarting, rebuilding or migrating.
        degraded_s: Capacity missing while the job ran with fewer replica groups.
        borrowed_node_s: Node-seconds taken from lower-priority jobs.
    """

    productive_s: float = 0.0
    lost_s: float = 0.0
    checkpoint_s: float = 0.0
    detect_s: float = 0.0
    wait_s: float = 0.0
    recover_s: float = 0.0
    degraded_s: float = 0.0
    borrowed_node_s: float = 0.0
    failures: int = 0
    served_live: int = 0
    migrated: int = 0
    rollbacks: int = 0
    false_alarms: int = 0
    waits_for_spare: int = 0
    failures_by_cause: dict[str, int] = field(default_factory=lambda: {})

    @property
    def duration_s(self) -> float:
        """All of the job's time."""
        return sum(getattr(self, name) for name in TIME_PARTS)

    @property
    def ettr(self) -> float:
        """Effective training time ratio: the share of the time that was productive."""
        return self.productive_s / self.duration_s

    @property
    def live_share(self) -> float:
        """Share of the failures that were served with no lost progress; 1 where there were none."""
        return (self.served_live + self.migrated) / self.failures if self.failures else 1.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the failures of one job cost, in US dollars over the simulated time.

    Args:
        wasted_usd: The job's GPUs while it was not productive.
        spares_usd: Holding idle spares, and the hours borrowed from lower-priority jobs.
    """

    wasted_usd: float
    spares_usd: float

    @property
    def total_usd(self) -> float:
        """Both together."""
        return self.wasted_usd + self.spares_usd


def cost_of(outcome: Outcome, scenario: Scenario, spares: int) -> Cost:
    """Price one outcome. `spares` idle nodes were held all the time."""
    gpu_usd_per_s = scenario.price_usd_per_gpu_h / HOUR_S
    idle_node_s = spares * scenario.duration_s + outcome.borrowed_node_s
    return Cost(
        wasted_usd=(outcome.duration_s - outcome.productive_s) * scenario.num_gpus * gpu_usd_per_s,
        spares_usd=idle_node_s * scenario.gpus_per_node * gpu_usd_per_s,
    )
