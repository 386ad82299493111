"""What a job does when a node fails: the policies that are compared, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from trainonce.errors import ConfigError

_MAX_S = 1e9  # thirty years


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a job meets a failure, and what that costs.

    A failure is served live with probability `live_share`; else the job goes back to its last
    checkpoint. All times are seconds.

    Args:
        name: How it is chosen on the command line.
        summary: One phrase for tables.
        checkpoint_interval_s: Between checkpoints; None lets Young's formula choose it from the
            time between rollbacks, `sqrt(2 * write * mttf / (1 - live_share))`.
        checkpoint_write_s: How long the job stands still for a checkpoint.
        detect_exit_s: Until a process that exits is acted upon.
        detect_hang_s: Until a hang is acted upon.
        restart_s: From detection (and a spare, where one is needed) until the job computes again
            from its checkpoint.
        live_share: Probability that a failure is served without going back.
        live_pause_s: From detection until the job computes again, when served live.
        live_lost_s: Work that is done again when served live.
        predicts: Whether warnings are acted upon, the false ones too.
        migrate_pause_s: Length of a planned migration.
        replica_groups: 0: a lost node stops the job until it is replaced. Otherwise the job goes
            on without the group that lost it, and a group is 1/replica_groups of the job.
        heal_s: Until a group that has its node back computes again.
        spare_source: "idle": nodes held for nothing else. "low-priority": a lower-priority job
            is parked, and only the borrowed hours are paid.
        borrow_s: Until a parked job has given up its node.
    """

    name: str
    summary: str = ""
    checkpoint_interval_s: float | None = None
    checkpoint_write_s: float = 20.0
    detect_exit_s: float = 60.0
    detect_hang_s: float = 60.0
    restart_s: float = 300.0
    live_share: float = 0.0
    live_pause_s: float = 0.0
    live_lost_s: float = 0.0
    predicts: bool = False
    migrate_pause_s: float = 0.0
    replica_groups: int = 0
    heal_s: float = 0.0
    spare_source: Literal["idle", "low-priority"] = "idle"
    borrow_s: float = 60.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_s") and value is not None and not 0 <= value <= _MAX_S:
                raise self._error(item.name, f"must be a number of seconds, 0 to {_MAX_S:g}")
        if self.checkpoint_interval_s is not None and self.checkpoint_interval_s < 1:
            raise self._error("checkpoint_interval_s", "must be at least 1")
        if self.checkpoint_interval_s is None and self.checkpoint_write_s == 0:
            raise self._error(
                "checkpoint_write_s", "must be more than 0 where Young's formula chooses"
            )
        if not 0 <= self.live_share <= 1:
            raise self._error("live_share", "must lie between 0 and 1")
        if self.checkpoint_interval_s is None and self.live_share == 1:
            raise self._error(
                "live_share", "must be below 1 where Young's formula chooses the interval"
            )
        if self.replica_groups < 0 or self.replica_groups == 1:
            raise self._error("replica_groups", "must be 0 or at least 2")
        if self.spare_source not in ("idle", "low-priority"):
            raise self._error("spare_source", 'must be "idle" or "low-priority"')

    def _error(self, name: str, rule: str) -> ConfigError:
        return ConfigError(
            f"policy {self.name!r}: {name} {rule}, not {getattr(self, name)!r}",
            hint="docs/simulate.md lists the settings with their units",
        )


_LIVE_MIGRATION = Policy(
    name="live-migration",
    summary="move to an idle spare in two minutes",
    live_share=0.9,
    live_pause_s=120.0,
    live_lost_s=15.0,
    predicts=True,
    migrate_pause_s=30.0,
)
_TRAINONCE = Policy(
    name="trainonce",
    summary="rebuild from replicas on a hot spare, nothing recomputed",
    detect_exit_s=10.0,
    live_share=0.9,
    live_pause_s=30.0,
    predicts=True,
    migrate_pause_s=10.0,
)


def _with_borrowed_spares(policy: Policy) -> Policy:
    return replace(
        policy,
        name=f"{policy.name}-low-priority",
        summary="the same, with spares from low-priority jobs",
        spare_source="low-priority",
    )


# Naive and tuned are the two restart set-ups whose waste was published for 2,048 GPUs. The three
# live ones share one `live_share`, the guaranteed 90 %, so that they differ by mechanism alone.
POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            name="restart-naive",
            summary="checkpoint every 2 h, half an hour to notice and restart",
            checkpoint_interval_s=7200.0,
            checkpoint_write_s=60.0,
            detect_exit_s=600.0,
            detect_hang_s=600.0,
            restart_s=1200.0,
        ),
        Policy(name="restart-tuned", summary="Young's interval, six minutes to restart"),
        Policy(
            name="replica-drop",
            summary="go on without the replica group that lost a node",
            detect_exit_s=30.0,
            live_share=0.9,
            live_pause_s=20.0,
            live_lost_s=15.0,
            replica_groups=16,
            heal_s=600.0,
        ),
        _LIVE_MIGRATION,
        _with_borrowed_spares(_LIVE_MIGRATION),
        _TRAINONCE,
        _with_borrowed_spares(_TRAINONCE),
    )
}
