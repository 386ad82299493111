"""The cluster that is simulated: its size, its failures, its repairs and its price."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError
from trainonce.simulate import theory
from trainonce.simulate.failures import CAUSES, DAY_S, HOUR_S, RATES, Cause, FailureRates

if TYPE_CHECKING:
    from trainonce.simulate.policies import Policy

MAX_GPUS = 1_000_000
MAX_EVENTS = 2_000_000  # failures and alarms of one job: some seconds, some hundred megabytes
_MAX_PRICE_USD = 1e6
_MAX_HOURS = 100_000.0  # of a repair: eleven years
_MAX_SPARES = 10  # for each node of the job


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One job that fills a cluster for a while.

    Args:
        num_gpus: GPUs of the job, a multiple of `gpus_per_node`.
        gpus_per_node: GPUs that go down together.
        days: Simulated time.
        rates: How often nodes fail.
        causes: What fails, and how.
        spares: Idle nodes held beside the job.
        spares_share: The same as a share of the job's nodes, where `spares` is None. Where both
            are, `spares_that_pay` tells for each policy.
        repair_h: Mean length of a repair, exponentially distributed.
        reset_h: Mean length of a reset, where nothing has to be repaired.
        inspection_h: How long a node stays out after a false alarm.
        false_alarms_per_node_day: Warnings without a failure. 0.84 a day on 63 nodes were
            reported by Lablup.
        price_usd_per_gpu_h: What a GPU costs an hour, working or not.
    """

    num_gpus: int
    gpus_per_node: int = 8
    days: float = 365.0
    rates: FailureRates = RATES["rsc-1"]
    causes: tuple[Cause, ...] = field(default=CAUSES, repr=False)
    spares: int | None = None
    spares_share: float | None = None
    repair_h: float = 24.0
    reset_h: float = 0.5
    inspection_h: float = 1.0
    false_alarms_per_node_day: float = 0.84 / 63
    price_usd_per_gpu_h: float = 3.0

    def __post_init__(self) -> None:
        self._check_size()
        for name in ("repair_h", "reset_h", "inspection_h"):
            if not 0 <= getattr(self, name) <= _MAX_HOURS:
                raise ConfigError(
                    f"{name} must be 0 to {_MAX_HOURS:,.0f} hours, not {getattr(self, name)!r}"
                )
        if not 0 <= self.false_alarms_per_node_day < math.inf:
            raise ConfigError(
                f"false_alarms_per_node_day must be 0 or more, not "
                f"{self.false_alarms_per_node_day!r}"
            )
        if not 0 < self.price_usd_per_gpu_h <= _MAX_PRICE_USD:
            raise ConfigError(
                f"a GPU-hour must cost more than 0 and at most {_MAX_PRICE_USD:g} dollars, "
                f"not {self.price_usd_per_gpu_h!r}",
                hint="about 2 to 5 US dollars on a cloud",
            )
        events = self.expected_failures + self.expected_alarms
        if events > MAX_EVENTS:
            raise ConfigError(
                f"{self.expected_failures:.3g} failures and {self.expected_alarms:.3g} false "
                f"alarms are expected in {self.days:g} days on {self.num_gpus} GPUs; a job can "
                f"have {MAX_EVENTS:,} of both",
                hint=f"simulate {self.days * MAX_EVENTS / events:.2g} days, or check the rates",
            )

    def _check_size(self) -> None:
        if not 1 <= self.gpus_per_node <= 1024:
            raise ConfigError(f"a node has 1 to 1024 GPUs, not {self.gpus_per_node}")
        if not 1 <= self.num_gpus <= MAX_GPUS:
            raise ConfigError(
                f"the job must have 1 to {MAX_GPUS:,} GPUs, not {self.num_gpus}",
                hint="for example --gpus 2048",
            )
        if self.num_gpus % self.gpus_per_node:
            below = self.num_gpus // self.gpus_per_node * self.gpus_per_node
            raise ConfigError(
                f"{self.num_gpus} GPUs do not fill nodes of {self.gpus_per_node}",
                hint=f"take {below or self.gpus_per_node} GPUs, or set gpus_per_node",
            )
        if not 0.01 <= self.days <= 36_500:
            raise ConfigError(
                f"simulate 0.01 to 36,500 days, not {self.days!r}", hint="365 are a year"
            )
        hint = "a few percent of the job's nodes are usual; --spares auto takes what pays"
        if self.spares is not None and not 0 <= self.spares <= _MAX_SPARES * self.num_nodes:
            raise ConfigError(
                f"{self.spares} spare nodes for a job of {self.num_nodes} make no sense", hint=hint
            )
        if self.spares_share is not None and not 0 <= self.spares_share <= _MAX_SPARES:
            raise ConfigError(f"spares of {self.spares_share:.0%} make no sense", hint=hint)

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return self.num_gpus // self.gpus_per_node

    @property
    def duration_s(self) -> float:
        """Simulated time in seconds."""
        return self.days * DAY_S

    @property
    def rate_per_s(self) -> float:
        """Failures of the job a second."""
        return 1 / self.mttf_s

    @property
    def mttf_s(self) -> float:
        """Mean time between failures of the job, in seconds."""
        return self.rates.mttf_s(self.num_gpus, self.gpus_per_node)

    @property
    def expected_failures(self) -> float:
        """Failures to expect in the simulated time."""
        return self.duration_s / self.mttf_s

    @property
    def expected_alarms(self) -> float:
        """False alarms to expect in the simulated time."""
        return self.false_alarms_per_node_day * self.num_nodes * self.days

    def expected_events(self, policy: Policy) -> float:
        """Everything to expect in the simulated time under `policy`: what simulating it costs."""
        nodes = self.num_nodes + self.spares_for(policy)
        alarms = self.expected_alarms if policy.predicts else 0.0
        return self.expected_failures * nodes / self.num_nodes + alarms

    def mean_out_s(self, policy: Policy) -> float:
        """Mean seconds for which a failure takes a node away and a spare is needed under `policy`.

        A policy that only restarts waits for a reset in place; one that serves failures live
        replaces the node at once.
        """
        total = sum(cause.count for cause in self.causes)
        permanent = sum(c.count * c.permanent for c in self.causes) / total
        reset = sum(c.count * (1 - c.permanent) for c in self.causes if c.loses_node) / total
        live = policy.live_share > 0
        return (permanent * self.repair_h + (reset * self.reset_h if live else 0.0)) * HOUR_S

    def spares_for(self, policy: Policy) -> int:
        """Return the idle spares held under `policy`: as set, or as many as pay off.

        Raises:
            ConfigError: So many nodes are in repair at a time that no spares would do.
        """
        if policy.spare_source == "low-priority":
            return 0
        if self.spares is not None:
            return self.spares
        if self.spares_share is not None:
            return round(self.spares_share * self.num_nodes)
        out = theory.mean_nodes_out(rate_per_s=self.rate_per_s, mean_out_s=self.mean_out_s(policy))
        if policy.predicts:
            alarms_per_s = self.false_alarms_per_node_day * self.num_nodes / DAY_S
            out += alarms_per_s * self.inspection_h * HOUR_S
        if out > _MAX_SPARES * self.num_nodes:
            raise ConfigError(
                f"{out:.3g} nodes would be in repair at a time, of a job of {self.num_nodes}",
                hint="check the rates, repair_h and inspection_h",
            )
        return theory.spares_that_pay(
            nodes_out=out, stall_nodes=self.num_nodes / max(1, policy.replica_groups)
        )

    def interval_s(self, policy: Policy) -> float:
        """Seconds of computation between two checkpoints under `policy`."""
        if policy.checkpoint_interval_s is not None:
            return policy.checkpoint_interval_s
        between_rollbacks_s = self.mttf_s / (1 - policy.live_share)
        return theory.young_interval_s(policy.checkpoint_write_s, between_rollbacks_s)
