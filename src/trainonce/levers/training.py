"""The parts that `fit` puts together: levers of a plan, one update, and what watches over it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch.nn.parallel import DistributedDataParallel

from trainonce.errors import ConfigError
from trainonce.ledger.spending import Action
from trainonce.levers.base import Lever, Stack
from trainonce.levers.batches import blocks_of, call_model, num_samples, to_device, unwrapped
from trainonce.levers.early_stop import EarlyStop
from trainonce.levers.fingerprint import amount_of, is_per_sample, kept
from trainonce.levers.freeze import Freeze
from trainonce.levers.guard import Verdict, judge
from trainonce.levers.infobatch import InfoBatch, WithIndex
from trainonce.levers.memory import Accumulation
from trainonce.levers.noise_scale import NoiseScale
from trainonce.levers.optimizer import muon_adamw
from trainonce.levers.precision import Precision
from trainonce.levers.probes import guard_indices, sum_losses
from trainonce.levers.quantized import quantized_training
from trainonce.levers.recompute import recompute, recompute_all
from trainonce.levers.schedule import Schedule
from trainonce.levers.sequence import SequenceWarmup
from trainonce.worker.seeds import derive_seed, seed_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from trainonce.ledger.spending import BudgetGate, SpendingMeter
    from trainonce.levers.batches import Data
    from trainonce.levers.host import Host
    from trainonce.levers.plan_file import Plan
    from trainonce.levers.recompute import Recomputing

    Loss = Callable[[Any, Any], torch.Tensor]
    Count = Callable[[Any], torch.Tensor]

BEST = "best.safetensors"


def build_levers(
    plan: Plan, model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Data,
    *, device: torch.device, seed: int,
) -> dict[str, Lever]:  # fmt: skip
    """Return the levers of a plan that act while it trains, in the registry's order.

    Those that are off are built too, and do nothing: so a plan's levers have the same state
    whatever is on.

    Raises:
        ConfigError: Settings of the plan that a lever cannot use.
    """

    def settings(name: str) -> dict[str, Any]:
        return {**plan.settings(name), "enabled": plan.is_on(name)}

    levers: dict[str, Lever] = {}
    try:
        mode = settings("precision")
        levers["precision"] = Precision(mode.pop("mode", None), device=device, **mode)
        schedule = Schedule(optimizer, plan.run.steps, **settings("schedule"))
        levers["schedule"] = schedule
        if plan.is_on("noise-scale"):
            levers["noise-scale"] = NoiseScale(
                optimizer, plan.run.batch_size, schedule=schedule, **settings("noise-scale")
            )
        if plan.is_on("sequence-warmup"):
            length = plan.fingerprint.sequence_length
            levers["sequence-warmup"] = SequenceWarmup(
                length, plan.run.steps, **settings("sequence-warmup")
            )
        if plan.is_on("infobatch"):
            levers["infobatch"] = InfoBatch(len(data), seed=seed, **settings("infobatch"))
        if plan.is_on("freeze"):
            levers["freeze"] = Freeze(blocks_of(model), **settings("freeze"))
        if plan.is_on("early-stop"):
            levers["early-stop"] = EarlyStop(
                schedule=schedule, wait_for=list(levers.values()), **settings("early-stop")
            )
    except TypeError as error:
        raise unknown_settings(error) from error
    return levers


def _recompute(
    plan: Plan, model: torch.nn.Module, data: Data, loss: Loss, device: torch.device
) -> Recomputing | None:
    """Have the model's blocks recompute activations, where the plan says so."""
    if not plan.is_on("recompute"):
        return None
    size = max(min(plan.run.micro_batch, len(data)), 1)

    def forward() -> None:
        batch = to_device(data.batch(range(size)), device)
        loss(call_model(model, batch), batch)

    settings = plan.settings("recompute")
    with kept(model):
        if not settings:
            return recompute_all(blocks_of(model))
        try:
            return recompute(blocks_of(model), forward, **settings)
        except TypeError as error:
            raise unknown_settings(error) from error


def _quantize(plan: Plan, model: torch.nn.Module) -> None:
    if not plan.is_on("quantized"):
        return
    try:
        quantized_training(model, **plan.settings("quantized"))
    except TypeError as error:
        raise unknown_settings(error) from error


def unknown_settings(error: TypeError) -> ConfigError:
    """Return the error for settings of a plan that a lever has no arguments for."""
    return ConfigError(
        f"a lever has settings in the plan that it does not know: {error}",
        hint="see docs/levers.md, or make the plan anew",
    )


def build_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a plan: Muon with AdamW, or AdamW."""
    weight_decay = float(plan.settings("optimizer").get("weight_decay", 0.01))
    on = plan.is_on("optimizer")
    return muon_adamw(unwrapped(model), plan.run.lr, enabled=on, weight_decay=weight_decay)


@dataclass
class State:
    """What must survive beside model, optimizer and levers; equal on all ranks.

    Attributes:
        updates: Loader batches trained on so far: one an update, but for the noise scale.
        before: The same before the last update.
        best: Best value on the evaluation data, and `best_step`, after how many updates.
        history: [updates, training loss, value or NaN] of each look.
        stop: Why the run ended early; "" if it did not.
        stop_is_budget: It may go on with a larger budget.
        guard: What the guard said last; `guard_fired`: it has switched levers off.
        spent: Used so far, by kind.
    """

    updates: int = 0
    before: int = 0
    best: float = math.inf
    best_step: int = 0
    history: list[list[float]] = field(default_factory=lambda: [])
    stop: str = ""
    stop_is_budget: bool = False
    guard: str = ""
    guard_fired: bool = False
    spent: dict[str, float] = field(default_factory=lambda: {})

    def state_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        vars(self).update(state)


class Training:
    """One run: the model, its levers, and what an update and a look at the run do.

    Args:
        host: Where it runs.
        plan: What is on.
        model: Of the caller, on the host's device.
        data: To train on.
        eval_data: To evaluate on, if any.
        loss: Of the caller.
        metric: Of the caller, lower is better; the loss if None.
        optimizer: Of the caller; the plan's if None.
        count: Of the caller: how much of each sample counts; its samples if None.
        seed: Of order and generators.
        gate: Watches the budget.
        meter: What is spent.
        tensorboard: Folder of its event files.
        show: Called with each line of progress.
    """

    def __init__(
        self, host: Host, plan: Plan, model: torch.nn.Module, data: Data, eval_data: Data | None,
        loss: Loss, metric: Loss | None, optimizer: torch.optim.Optimizer | None, *,
        count: Count | None, seed: int, gate: BudgetGate, meter: SpendingMeter,
        tensorboard: Path | None, show: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.host, self.plan, self.state = host, plan, State()
        _quantize(plan, model)
        self.optimizer = optimizer or build_optimizer(plan, model)
        self.levers = build_levers(plan, model, self.optimizer, data, device=host.device, seed=seed)
        if {"infobatch", "noise-scale"} <= self.levers.keys() and host.world_size > 1:
            raise ConfigError(
                "InfoBatch gathers scores in each batch, and the noise scale joins batches that "
                "must not communicate",
                hint="switch one of them off in the plan, or train on one rank",
            )
        if count is not None and "noise-scale" in self.levers:
            raise ConfigError(
                "the noise scale joins batches to one update before it is known what counts in all",
                hint="switch the noise scale off in the plan, or give no count",
            )
        self.stack = Stack(**self.levers)
        self.loader = self._make_loader(data)
        self._recomputing = _recompute(plan, model, data, loss, host.device)
        self.model = model
        if host.world_size > 1 and not isinstance(model, DistributedDataParallel):
            unused = plan.is_on("freeze")
            self.model = DistributedDataParallel(model, find_unused_parameters=unused)
        self._eval_data, self._loss, self._metric = eval_data, loss, metric or loss
        self._count, self._metric_count = count, None if metric else count
        self._guard_data = eval_data or data
        self._guard_indices = guard_indices(len(data), len(eval_data) if eval_data else None, seed)
        self._seed = seed
        self._gate, self._meter, self._show = gate, meter, show
        self._writer = _open_tensorboard(tensorboard)
        self._look_every = max(plan.run.steps // 20, 1)
        self._budget_every = max(plan.run.steps // 200, 1)
        self._begun_s, self._begun_at, self._last_step = time.monotonic(), 0, 0
        self._joined = 0  # batches whose gradients wait for their update
        self.model.train()

    def _make_loader(self, data: Data) -> Any:
        sampler = self.levers.get("infobatch")
        order = {"shuffle": True} if sampler is None else {"sampler": sampler}
        return self.host.dataloader(
            WithIndex(data.dataset),
            max(self.plan.run.batch_size // self.host.world_size, 1),
            collate_fn=data.collate_indexed,
            drop_last=True,
            num_workers=data.num_workers,
            **order,
        )

    def flags(self) -> contextlib.AbstractContextManager[None]:
        """Return the context that holds the process-wide flags of the precision."""
        precision = self.levers["precision"]
        assert isinstance(precision, Precision)
        return precision.flags()

    # ------------------------------------------------------------------ one update

    def update(self, indexed: tuple[torch.Tensor, Any]) -> torch.Tensor:
        """Train on one batch, and return the mean loss of this rank's samples, shape ().

        It is an update, unless the noise scale wants more batches in one: then gradients stay
        here until the last of them.
        """
        indices, batch = indexed
        first = self.state.updates
        if first != self._last_step:  # the state was loaded from elsewhere
            self._meter.restart(self.state.spent)
            self._begun_s, self._begun_at, self._last_step = time.monotonic(), first, first
        if self._joined and all(p.grad is None for p in self.model.parameters()):
            self._joined = 0  # what waited is gone: a rehearsal, or a state from elsewhere
        step = first + self._joined
        # By the step alone: what looks at the run in between must not change what it draws.
        seed_generators(derive_seed("update", self._seed, self.host.rank, step))
        if not self._joined:
            self.stack.begin_step(first)
        wanted = min(self._num_batches(), self.plan.run.steps - first)
        self._joined += 1
        is_last = self._joined == wanted
        no_sync = getattr(self.model, "no_sync", None)
        with contextlib.nullcontext() if is_last or no_sync is None else no_sync():
            total = self._backward(indices, batch, 1 / wanted)
        if is_last:
            self.stack.update(self.optimizer)
            self.stack.end_step(step)
            self.optimizer.zero_grad(set_to_none=True)
            self.state.before, self.state.updates = first, first + wanted
            self._last_step, self._joined = self.state.updates, 0
        return total

    def _num_batches(self) -> int:
        lever = self.levers.get("noise-scale")
        return lever.num_batches if isinstance(lever, NoiseScale) and lever.enabled else 1

    def _backward(self, indices: torch.Tensor, batch: Any, weight: float) -> torch.Tensor:
        """Add the gradients of a batch, times `weight`, to those there are; return its loss."""
        before = num_samples(batch)
        batch = self.stack.shape_batch(to_device(batch, self.host.device))
        samples = num_samples(batch)
        # Sequences that were cut count as parts of a sample: as many tokens fit at once.
        accumulation = Accumulation(max(self.plan.run.micro_batch * samples // before, 1))
        amount = amount_of(batch, self._count)
        # Every rank has as many samples: what does not fill a step is left out.
        scale = weight / samples
        if self._count is not None:
            scale = weight * accumulation.scale(amount, self.host.device)
        local = self.host.local
        total = torch.zeros((), dtype=torch.float64, device=self.host.device)
        for (part, micro), sync in accumulation.split(
            (indices if samples == before else torch.arange(samples), batch), self.model
        ):
            with sync:
                with self.stack.autocast():
                    losses = self._loss(call_model(self.model, micro), micro).float()
                count = num_samples(micro)
                mean = self._reduce(losses, part, count)
                share, weighs = losses.detach().double().mean() * (count / samples), count / samples
                if self._count is not None:
                    share, weighs = losses.detach().double().sum(), amount_of(micro, self._count)
                total += share
                # Before the backward pass: the last collective is in there, and what differs by
                # rank must be known by then, or it is lost with a process that dies right after.
                local["loss_sum"] = share + local.get("loss_sum", 0.0)
                local["loss_count"] = local.get("loss_count", 0.0) + weighs
                self.stack.scale_loss(mean * (count * scale)).backward()
        return total if self._count is None else total / max(amount, 1)

    def _reduce(self, losses: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
        if is_per_sample(losses, count):
            return self.stack.reduce_loss(losses, indices)
        if self._count is not None:
            raise ConfigError(
                "the loss is a scalar, and a count was given",
                hint="return the sum over what counts of each sample, shape (B,)",
            )
        if "infobatch" in self.levers and self.levers["infobatch"].enabled:
            raise ConfigError(
                "the loss is a scalar, and InfoBatch is on in the plan",
                hint="return one value a sample, or switch [levers.infobatch] off",
            )
        return losses

    # ------------------------------------------------------------------ looking at the run

    def due(self) -> bool:
        """Tell whether to look at the run after this batch; the same on every rank."""
        if self._joined:
            return False
        every = self._budget_every if self._gate.has_limits else self._look_every
        return self._passed(every) or self._regular() or self._at_guard()

    def _passed(self, every: int) -> bool:
        """Tell whether the last update reached or passed a multiple of `every`."""
        return self.state.updates // every > self.state.before // every

    def _regular(self) -> bool:
        return self._passed(self._look_every) or self.state.updates == self.plan.run.steps

    def _at_guard(self) -> bool:
        return self.state.before < self.plan.probes.guard_step <= self.state.updates

    def look(self) -> None:
        """Evaluate, guard, keep the best weights, ask the budget. Collective."""
        state = self.state
        step = state.updates
        local = self.host.local
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
        mine = list(range(self.host.rank, len(self._eval_data), self.host.world_size))
        sums = self._sum_of(self._metric, self._eval_data, mine, self._metric_count)
        return self._mean_over_ranks(*sums)

    def _sum_of(
        self, function: Loss, data: Data, indices: list[int], count: Count | None
    ) -> tuple[float, int]:
        self.model.eval()
        with self.stack.autocast():
            size = max(self.plan.run.micro_batch, 1)
            found = sum_losses(
                unwrapped(self.model), data, indices, function, self.host.device, size, count
            )
        self.model.train()
        return found

    def _mean_over_ranks(self, total: float, count: float) -> float:
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.host.device)
        if self.host.world_size > 1:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1]) if float(sums[1]) else math.nan

    def _note_best(self, value: float, step: int) -> None:
        stop = self.levers.get("early-stop")
        if isinstance(stop, EarlyStop) and self._eval_data is not None:
            decision = stop.observe(step - 1, value)
            if decision.stop:
                self.state.stop = decision.reason
        if value < self.state.best:
            self.state.best, self.state.best_step = value, step
            if self.host.rank == 0:
                save_weights(unwrapped(self.model), self.host.folder / BEST)

    def _guard(self, step: int, loss: float) -> None:
        compared = loss
        if math.isfinite(loss):
            # Ranks may differ by their batch norms' statistics, and must decide alike.
            compared = self._mean_over_ranks(
                *self._sum_of(self._loss, self._guard_data, self._guard_indices, self._count)
            )
        on = [lever for lever in self.levers.values() if lever.enabled]
        decision = judge(
            compared,
            self.plan.probes.off_arm,
            step=step,
            reversible=[n for n, lever in self.levers.items() if _can_harm(lever)],
            ramping=[x.info.name for x in on if x.ramping(step) and not isinstance(x, Schedule)],
            fired=self.state.guard_fired,
        )  # fmt: skip
        if decision.verdict is Verdict.SWITCH_OFF:
            self.state.guard_fired = True
            for name in decision.levers:
                self.levers[name].enabled = False
            self._say(f"guard: {decision.reason}; switched off: {', '.join(decision.levers)}")
        elif decision.verdict is Verdict.REPORT:
            self._say(f"guard: {decision.reason}")
            if not math.isfinite(compared):
                self.state.stop = decision.reason  # what follows would be wasted
        self.state.guard = f"{decision.verdict.value}: {decision.reason}"

    def _ask_budget(self) -> None:
        used = self.state.spent = self._agree_most(self._meter.used())
        decision = self._gate.decide(used)
        if decision.action is Action.WARN:
            self._say(f"budget: {decision.reason}")
        elif decision.action is Action.STOP:
            self.state.stop = f"the budget is spent: {decision.reason}"
            self.state.stop_is_budget = True
            self._say(self.state.stop)

    def _agree_most(self, used: dict[str, float]) -> dict[str, float]:
        if self.host.world_size == 1:
            return used
        names = sorted(used)
        most = torch.tensor([used[n] for n in names], dtype=torch.float64, device=self.host.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return dict(zip(names, most.tolist(), strict=True))

    def stopped(self) -> bool:
        """Tell whether the run ends here, before its last update."""
        if self.state.stop_is_budget and not self._gate.is_spent(self.state.spent):
            self.state.stop, self.state.stop_is_budget = "", False  # it goes on with a larger one
        return bool(self.state.stop)

    def worth_saving(self) -> bool:
        """Tell whether a plain process should write its state after this update."""
        return self._regular() or self.stopped()

    # ------------------------------------------------------------------ telling people

    def _report(self, step: int, loss: float, value: float) -> None:
        steps = self.plan.run.steps
        elapsed_s = time.monotonic() - self._begun_s
        done = max(step - self._begun_at, 1)
        evaluated = "" if math.isnan(value) else f", eval {value:.4g} (best {self.state.best:.4g})"
        self._say(
            f"step {step}/{steps} ({step / steps:.0%}): loss {loss:.4g}{evaluated}, "
            f"{elapsed_s / done * (steps - step):.0f} s left"
        )
        if self._writer is not None and self.host.rank == 0:
            self._writer.add_scalar("loss/train", loss, step)
            if not math.isnan(value):
                self._writer.add_scalar("eval", value, step)
            self._writer.flush()

    def _say(self, line: str) -> None:
        if self.host.rank == 0:
            self._show(line)

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()
        if self._recomputing is not None:
            self._recomputing.remove()


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
