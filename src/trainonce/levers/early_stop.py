"""Stopping when nothing more is gained, with regard to the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.levers.base import Lever, LeverInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainonce.levers.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class StopDecision:
    """Whether to stop, and why or why not.

    Args:
        stop: Whether training should end here.
        reason: One sentence.
        reached: The value is at the target. Until it has been so for `hold` evaluations, an
            update would change what was measured: make none, and evaluate again.
    """

    stop: bool
    reason: str
    reached: bool = False


class EarlyStop(Lever):
    """Says when to stop: the metric no longer improves, or a target is held.

    Before the rate decays, and while a lever still ramps (warm-up, short sequences), values say
    nothing about the finished run: they are not counted, and nothing stops. For reinforcement
    learning give `target`, with the mean return as the value and `better="higher"`. Returns that
    were seen while the policy changed may be luck, and lag behind it: with `hold=2` and no update
    while `reached`, it stops only if other episodes of that very policy hold the target.

    Args:
        patience: Evaluations in a row without improvement; None never stops for that.
        min_delta: A smaller improvement is none.
        better: "lower" or "higher".
        target: Stop once it is reached.
        hold: So many evaluations in a row.
        schedule: Stop only when its rate decays.
        wait_for: Levers that may ramp.
        enabled: False never stops.

    Raises:
        ConfigError: There is nothing to stop for, or a setting out of range.
    """

    info = LeverInfo(
        name="early-stop",
        saves="what the budget is too long by: 95 % of CartPole's FLOPs together with a quarter of "
        "each batch, 81 % against a tuned budget; nothing at equal quality on Acrobot "
        "(benchmarks/levers)",
        source="Prechelt, Early Stopping, But When?, 1998",
        applies="the budget is a guess, as in reinforcement learning",
        hurts="a metric noisier than min_delta; with decay to zero a shorter schedule is better",
        reversible=True,
        default_on=False,
    )

    def __init__(
        self,
        *,
        patience: int | None = None,
        min_delta: float = 0.0,
        better: str = "lower",
        target: float | None = None,
        hold: int = 1,
        schedule: Schedule | None = None,
        wait_for: Sequence[Lever] = (),
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        if patience is None and target is None:
            raise ConfigError(
                "an early stop needs something to stop for", hint="patience or target"
            )
        in_range = min_delta >= 0 and hold >= 1 and (patience is None or patience >= 1)
        if better not in ("lower", "higher") or not in_range:
            raise ConfigError(
                f"no early stop has {patience=}, {min_delta=}, {better=}, {hold=}",
                hint='patience and hold >= 1, min_delta >= 0, better "lower" or "higher"',
            )
        self._patience = patience
        self._min_delta = min_delta
        self._sign = 1.0 if better == "lower" else -1.0
        self._target = target
        self._hold = hold
        self._schedule = schedule
        self._wait_for = list(wait_for)
        self._best = math.inf
        self._stale = 0
        self._held = 0

    def observe(self, step: int, value: float) -> StopDecision:
        """Take note of an evaluation after update number `step`, and decide.

        Args:
            step: From 0.
            value: The metric, equal on all ranks (reduce it first), or they stop apart. NaN
                is no improvement.
        """
        if not self.enabled:
            return StopDecision(stop=False, reason="early stop is off")
        if waits_for := self._waits_for(step):
            return StopDecision(stop=False, reason=waits_for)
        loss = self._sign * value
        reached = self._target is not None and loss <= self._sign * self._target
        self._held = self._held + 1 if reached else 0
        if loss < self._best - self._min_delta or (math.isinf(self._best) and not math.isnan(loss)):
            self._best, self._stale = loss, 0
        else:
            self._stale += 1
        if self._target is not None and self._held >= self._hold:
            reason = f"{value:g} holds the target {self._target:g} for {self._held} evaluations"
            return StopDecision(stop=True, reason=reason, reached=True)
        best = self._sign * self._best
        if self._patience is not None and self._stale >= self._patience:
            reason = f"no gain over {best:g} in {self._stale} evaluations"
            return StopDecision(stop=True, reason=reason)
        reason = f"best {best:g}, {self._stale} evaluations ago"
        return StopDecision(stop=False, reason=reason, reached=reached)

    def _waits_for(self, step: int) -> str:
        schedule = self._schedule
        if schedule is not None and schedule.enabled and not schedule.decaying(step):
            return f"the rate does not decay before step {schedule.decay_step}"
        for lever in (*self._wait_for, *filter(None, [schedule])):
            if lever.ramping(step):
                return f"{lever.info.name} still ramps at step {step}"
        return ""

    def _state(self) -> dict[str, Any]:
        return {"best": self._best, "stale": self._stale, "held": self._held}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._best = float(state["best"])
        self._stale, self._held = int(state["stale"]), int(state["held"])
