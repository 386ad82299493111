"""What watches over a training between its updates: evaluation, guard, budget, progress."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_model

from trainonce.errors import ConfigError
from trainonce.ledger.spending import Action
from trainonce.levers.batches import unwrapped
from trainonce.levers.early_stop import EarlyStop
from trainonce.levers.guard import Verdict, judge
from trainonce.levers.precision import Precision
from trainonce.levers.probes import guard_indices, sum_losses
from trainonce.levers.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainonce.ledger.spending import BudgetGate, SpendingMeter
    from trainonce.levers.base import Lever
    from trainonce.levers.batches import Count, Data, Loss
    from trainonce.levers.training import Training

BEST = "best.safetensors"


class Watch:
    """Looks at a training: is it good, is it harmed, is it paid for, and what to tell people.

    Args:
        training: What is watched.
        data: It trains on.
        eval_data: To evaluate on, if any.
        loss: Of the caller.
        metric: Of the caller, lower is better; the loss if None.
        count: As for `Training`; it goes with the loss, and not with a metric of its own.
        seed: Of which samples the guard compares on.
        gate: Watches the budget.
        meter: What is spent.
        tensorboard: Folder of its event files.
        show: Called with each line of progress.
    """

    def __init__(
        self, training: Training, data: Data, eval_data: Data | None, loss: Loss,
        metric: Loss | None, *, count: Count | None, seed: int, gate: BudgetGate,
        meter: SpendingMeter, tensorboard: Path | None, show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._training, self._host, self._plan = training, training.host, training.plan
        self._model, self._levers, self._state = training.model, training.levers, training.state
        self._eval_data, self._loss, self._metric = eval_data, loss, metric or loss
        self._count, self._metric_count = count, None if metric else count
        self._guard_data = eval_data or data
        self._guard_indices = guard_indices(len(data), len(eval_data) if eval_data else None, seed)
        self._gate, self._meter, self._show = gate, meter, show
        self._writer = _open_tensorboard(tensorboard)
        self._look_every = max(self._plan.run.steps // 20, 1)
        self._budget_every = max(self._plan.run.steps // 200, 1)
        self._begun_s, self._begun_at = time.monotonic(), 0
        training.went_on = self._restart

    def _restart(self) -> None:
        self._meter.restart(self._state.spent)
        self._begun_s, self._begun_at = time.monotonic(), self._state.updates

    def due(self) -> bool:
        """Tell whether to look at the run after this batch; the same on every rank."""
        if self._training.mid_update:
            return False
        every = self._budget_every if self._gate.has_limits else self._look_every
        return self._passed(every) or self._regular() or self._at_guard()

    def _passed(self, every: int) -> bool:
        """Tell whether the last update reached or passed a multiple of `every`."""
        return self._state.updates // every > self._state.before // every

    def _regular(self) -> bool:
        return self._passed(self._look_every) or self._state.updates == self._plan.run.steps

    def _at_guard(self) -> bool:
        return self._state.before < self._plan.probes.guard_step <= self._state.updates

    def look(self) -> None:
        """Evaluate, guard, keep the best weights, ask the budget. Collective."""
        state = self._state
        step = state.updates
        local = self._host.local
        loss = self._mean_over_ranks(float(local["loss_sum"]), local["loss_count"])
        value = math.nan
        if self._regular():
            value = self._evaluate()
            state.history.append([step, loss, value])
            local["loss_sum"], local["loss_count"] = 0.0, 0
            self._note_best(value if self._eval_data is not None else loss, step)
            self._report(step, loss, value)
        if self._at_guard() or not math.isfinite(loss):
            self._guard(step, loss)
        self._ask_budget()

    def _evaluate(self) -> float:
        """Return the metric over all evaluation data, the same on every rank; NaN without any."""
        if self._eval_data is None:
            return math.nan
        mine = list(range(self._host.rank, len(self._eval_data), self._host.world_size))
        sums = self._sum_of(self._metric, self._eval_data, mine, self._metric_count)
        return self._mean_over_ranks(*sums)

    def _sum_of(
        self, function: Loss, data: Data, indices: list[int], count: Count | None
    ) -> tuple[float, int]:
        self._model.eval()
        with self._training.stack.autocast():
            size = max(self._plan.run.micro_batch, 1)
            found = sum_losses(
                unwrapped(self._model), data, indices, function, self._host.device, size, count
            )
        self._model.train()
        return found

    def _mean_over_ranks(self, total: float, count: float) -> float:
        sums = torch.tensor([total, count], dtype=torch.float64, device=self._host.device)
        if self._host.world_size > 1:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1]) if float(sums[1]) else math.nan

    def _note_best(self, value: float, step: int) -> None:
        stop = self._levers.get("early-stop")
        if isinstance(stop, EarlyStop) and self._eval_data is not None:
            decision = stop.observe(step - 1, value)
            if decision.stop:
                self._state.stop = decision.reason
        if value < self._state.best:
            self._state.best, self._state.best_step = value, step
            if self._host.rank == 0:
                save_weights(unwrapped(self._model), self._host.folder / BEST)

    def _guard(self, step: int, loss: float) -> None:
        compared = loss
        if math.isfinite(loss):
            # Ranks may differ by their batch norms' statistics, and must decide alike.
            compared = self._mean_over_ranks(
                *self._sum_of(self._loss, self._guard_data, self._guard_indices, self._count)
            )
        on = [lever for lever in self._levers.values() if lever.enabled]
        decision = judge(
            compared,
            self._plan.probes.off_arm,
            step=step,
            reversible=[n for n, lever in self._levers.items() if _can_harm(lever)],
            ramping=[x.info.name for x in on if x.ramping(step) and not isinstance(x, Schedule)],
            fired=self._state.guard_fired,
        )  # fmt: skip
        if decision.verdict is Verdict.SWITCH_OFF:
            self._state.guard_fired = True
            for name in decision.levers:
                self._levers[name].enabled = False
            self._say(f"guard: {decision.reason}; switched off: {', '.join(decision.levers)}")
        elif decision.verdict is Verdict.REPORT:
            self._say(f"guard: {decision.reason}")
            if not math.isfinite(compared):
                self._state.stop = decision.reason  # what follows would be wasted
        self._state.guard = f"{decision.verdict.value}: {decision.reason}"

    def _ask_budget(self) -> None:
        used = self._state.spent = self._agree_most(self._meter.used())
        decision = self._gate.decide(used)
        if decision.action is Action.WARN:
            self._say(f"budget: {decision.reason}")
        elif decision.action is Action.STOP:
            self._state.stop = f"the budget is spent: {decision.reason}"
            self._state.stop_is_budget = True
            self._say(self._state.stop)

    def _agree_most(self, used: dict[str, float]) -> dict[str, float]:
        if self._host.world_size == 1:
            return used
        names = sorted(used)
        most = torch.tensor([used[n] for n in names], dtype=torch.float64, device=self._host.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return dict(zip(names, most.tolist(), strict=True))

    def stopped(self) -> bool:
        """Tell whether the run ends here, before its last update."""
        if self._state.stop_is_budget and not self._gate.is_spent(self._state.spent):
            self._state.stop, self._state.stop_is_budget = "", False  # it goes on with a larger one
        return bool(self._state.stop)

    def worth_saving(self) -> bool:
        """Tell whether a plain process should write its state after this update."""
        return self._regular() or self.stopped()

    def _report(self, step: int, loss: float, value: float) -> None:
        steps = self._plan.run.steps
        elapsed_s = time.monotonic() - self._begun_s
        done = max(step - self._begun_at, 1)
        evaluated = "" if math.isnan(value) else f", eval {value:.4g} (best {self._state.best:.4g})"
        self._say(
            f"step {step}/{steps} ({step / steps:.0%}): loss {loss:.4g}{evaluated}, "
            f"{elapsed_s / done * (steps - step):.0f} s left"
        )
        if self._writer is not None and self._host.rank == 0:
            self._writer.add_scalar("loss/train", loss, step)
            if not math.isnan(value):
                self._writer.add_scalar("eval", value, step)
            self._writer.flush()

    def _say(self, line: str) -> None:
        if self._host.rank == 0:
            self._show(line)

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()


def _can_harm(lever: Lever) -> bool:
    """Tell whether switching a lever off could help a run whose loss is too high."""
    if isinstance(lever, Precision):
        return lever.enabled and lever.mode in ("bf16", "fp16")
    return lever.enabled and lever.info.reversible and not isinstance(lever, EarlyStop)


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_model(model, str(partial))
    partial.replace(path)


def to_stderr(line: str) -> None:
    """Show a line of progress."""
    sys.stderr.write(f"fit: {line}\n")
    sys.stderr.flush()


def _open_tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard is not installed", hint="pip install tensorboard, or leave it out"
        ) from error
    return SummaryWriter(log_dir=str(folder))
