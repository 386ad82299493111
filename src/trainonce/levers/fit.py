"""`trainonce.fit`: a training loop of one screen that follows a plan."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.ledger import prices
from trainonce.ledger.spending import Budget, open_spending
from trainonce.levers.batches import as_data
from trainonce.levers.fingerprint import model_digest
from trainonce.levers.host import is_first_process, open_host, settle_plan
from trainonce.levers.plan_file import Plan
from trainonce.levers.planning import plan as make_plan
from trainonce.levers.training import Training
from trainonce.levers.watching import BEST, Watch, to_stderr

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.levers.batches import Data


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a run came to.

    Args:
        steps: Updates made.
        loss: Mean training loss of the last part of the run.
        value: Metric on the evaluation data at the end; NaN without any.
        best: Best value seen (the training loss where nothing was evaluated).
        best_step: After how many updates.
        stopped: Why it ended before its last update; "" if it did not.
        guard: What the guard said; "" if it was not asked.
        levers: The levers that were on at the end.
        spent: Hours, and money and energy where they are known; planning included.
        history: [updates, training loss, value] of each look at the run.
        plan: What it followed.
        weights: File of the best weights, safetensors.
        folder: Of everything the run wrote.
    """

    steps: int
    loss: float
    value: float
    best: float
    best_step: int
    stopped: str
    guard: str
    levers: tuple[str, ...]
    spent: dict[str, float]
    history: list[list[float]]
    plan: Plan
    weights: Path
    folder: Path


def fit(
    model: torch.nn.Module,
    train: Any,
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    eval: Any = None,
    metric: Callable[[Any, Any], torch.Tensor] | None = None,
    count: Callable[[Any], torch.Tensor] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    plan: Plan | str | Path | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    task: str | None = None,
    folder: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: Callable[[str], None] = to_stderr,
) -> FitResult:
    """Train a model with the levers of a plan, on the exactly-once runtime where there is one.

    In a job of `trainonce run` every update survives failures. In a plain process the state is
    kept in `folder`, and the same call goes on from there. It is a loop around parts that can
    all be had separately: see docs/plan.md.

    Args:
        model: Is moved to the device, and trained in place: it ends with the last weights.
        train: A map-style dataset, a `DataLoader` of one, or a tuple of tensors. A loader's
            batch size is that of an update, all ranks together.
        loss: `loss(out, batch)` returns one value a sample, shape (B,); a scalar switches the
            per-sample levers off.
        eval: Data to evaluate on.
        metric: `metric(out, batch)` like `loss`, lower is better; the loss if None.
        count: `count(batch)` returns how much of each sample counts, integers of shape (B,): its
            tokens that are not padding, say. `loss` then returns sums, and an update is over the
            mean of all that counts in it, over its micro-batches and all ranks.
        steps: Updates of the run.
        epochs: Or passes over the data.
        optimizer: The caller's own; its rates are the peaks of the schedule.
        plan: A plan, or a file of one: what does not exist is planned, and written there.
        budget: Limits; planning counts.
        seed: Of order and generators.
        task: As for `plan`.
        folder: For plan, state and best weights; a new one under TRAINONCE_HOME if None.
        tensorboard: Folder for event files.
        progress: Called with each line on rank 0; they go to stderr.

    Raises:
        ConfigError: Arguments that do not fit one another, or a plan of another model.
        ProbeError: A loss was not finite in a probe.
        BudgetSpentError: The budget is spent already.
    """
    _check_kinds(model, plan, budget, optimizer)
    host = open_host(seed=seed, folder=None if folder is None else Path(folder))
    model.to(host.device)
    data, eval_data = as_data(train), None if eval is None else as_data(eval)
    meter, gate = open_spending(
        budget or Budget(), host.world_size, prices.load(settings.home()).prices
    )

    def make() -> Plan:
        return make_plan(
            model, data, loss, task=task, budget=budget, eval=eval_data, steps=steps,
            epochs=epochs, optimizer=optimizer, seed=seed, world_size=host.world_size,
            count=count, progress=progress,
        )  # fmt: skip

    chosen = plan
    if not isinstance(chosen, Plan):
        chosen = settle_plan(Path(chosen) if chosen else host.folder / "plan.toml", make)
    _check_plan(chosen, model, data, host.world_size)
    if is_first_process():
        for line in _unused(chosen, steps, eval_data):
            progress(line)
    training = Training(host, chosen, model, data, loss, optimizer, count=count, seed=seed)
    watch = Watch(
        training, data, eval_data, loss, metric, count=count, seed=seed, gate=gate, meter=meter,
        tensorboard=Path(tensorboard) if tensorboard else None, show=progress,
    )  # fmt: skip
    with contextlib.closing(training), contextlib.closing(watch), training.flags():
        update, look = host.step(training.update), host.step(watch.look)
        host.protect(
            model=training.model, optimizer=training.optimizer, loader=training.loader,
            levers=training.stack, state=training.state,
        )  # fmt: skip
        if training.state.updates < chosen.run.steps:
            gate.check(training.state.spent)
        until = 0 if watch.stopped() else chosen.run.steps
        for batch in host.batches(training.loader, max_steps=until):
            update(batch)
            if watch.due():
                look()
                if watch.worth_saving():
                    host.save()
                if watch.stopped():
                    break
    return _result(training)


def _check_kinds(model: Any, plan: Any, budget: Any, optimizer: Any) -> None:
    """Raise where an argument is of another kind than its name says."""
    wanted = {
        "model": (model, (torch.nn.Module,), "a torch.nn.Module"),
        "plan": (plan, (Plan, str, Path), "a Plan, or the name of a file"),
        "budget": (budget, (Budget,), "trainonce.Budget(max_hours=...)"),
        "optimizer": (optimizer, (torch.optim.Optimizer,), "an optimizer that was made, or None"),
    }
    for name, (given, kinds, hint) in wanted.items():
        if not isinstance(given, kinds) and (given is not None or name == "model"):
            raise ConfigError(f"{name} is {given!r}", hint=hint)
    if optimizer is not None:
        mine = {id(parameter) for parameter in model.parameters()}
        groups: list[dict[str, Any]] = optimizer.param_groups
        if not any(id(parameter) in mine for group in groups for parameter in group["params"]):
            raise ConfigError(
                "the optimizer has none of the model's parameters",
                hint="make it of model.parameters(), after the model is as it will be trained",
            )


def _check_plan(plan: Plan, model: torch.nn.Module, data: Data, world_size: int) -> None:
    """Raise where a plan is of another model, or for more data."""
    mine = model_digest(model)
    if plan.fingerprint.model != mine:
        raise ConfigError(
            f"the plan was made for another model: {plan.fingerprint.model}, and this one is "
            f"{mine} (digests of names, shapes and dtypes)",
            hint="make a plan for this model, or give fit the model of the plan",
        )
    if max(plan.run.batch_size // world_size, 1) > len(data) // world_size:
        raise ConfigError(
            f"the plan has updates of {plan.run.batch_size} samples on {world_size} ranks, and "
            f"there are {len(data)} to train on",
            hint="make a plan for these data, or lower batch_size in it",
        )


def _unused(plan: Plan, steps: int | None, eval_data: Data | None) -> list[str]:
    """Return what was asked for and will do nothing, one sentence each."""
    found: list[str] = []
    if steps is not None and steps != plan.run.steps:
        found.append(f"the plan has {plan.run.steps} updates, and steps={steps} is not used")
    if not plan.fingerprint.per_sample:
        found.append("the loss is a scalar: levers that need one value a sample are off")
    if plan.is_on("early-stop") and eval_data is None:
        found.append(
            "early stop is on, and will not stop anything: there are no data to evaluate on"
        )
    return found


def _result(training: Training) -> FitResult:
    state = training.state
    last = state.history[-1] if state.history else [0, math.nan, math.nan]
    return FitResult(
        steps=state.updates,
        loss=last[1],
        value=last[2],
        best=state.best,
        best_step=state.best_step,
        stopped=state.stop,
        guard=state.guard,
        levers=tuple(name for name, lever in training.levers.items() if lever.enabled),
        spent=dict(state.spent),
        history=[list(each) for each in state.history],
        plan=training.plan,
        weights=training.host.folder / BEST,
        folder=training.host.folder,
    )
