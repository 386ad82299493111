"""`trainonce.plan`: fingerprint, probes, gates, and a plan that says why."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from trainonce.levers import gates
from trainonce.levers.batches import as_data, unwrapped
from trainonce.levers.findings import Findings
from trainonce.levers.fingerprint import take_fingerprint
from trainonce.levers.plan_file import Plan, RunPlan
from trainonce.levers.probes import Prober
from trainonce.levers.run_length import (
    asked_length,
    choose_batch_size,
    within_budget,
    without_pruned,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainonce.ledger.spending import Budget


def plan(
    model: torch.nn.Module,
    train: Any,
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    task: str | None = None,
    budget: Budget | None = None,
    eval: Any = None,
    steps: int | None = None,
    epochs: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    world_size: int = 1,
    count: Callable[[Any], torch.Tensor] | None = None,
    path: str | Path | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> Plan:
    """Look at a model and its data, try a few things, and say how to train with less compute.

    The probes train the model for a short while, several times, and put it back as it was.
    They run on one process, and communicate with nobody.

    Args:
        model: On the device on which it will be trained.
        train: A map-style dataset, a `DataLoader` of one, or a tuple of tensors. A loader's
            batch size is that of an update, all ranks together.
        loss: `loss(out, batch)` returns one value a sample, shape (B,); a scalar switches the
            per-sample levers off.
        task: "language-model", "vision", "finetune" or "other"; None: found by looking.
        budget: The run is planned no longer than it allows.
        eval: Data of the same kinds to evaluate on.
        steps: Updates of the run.
        epochs: Or passes over the data.
        optimizer: The caller's own; then no rate is probed and Muon is off.
        seed: Of the order of samples.
        world_size: Ranks that will train.
        count: As for `fit`.
        path: Write the plan there as well.
        progress: Told what is being tried.

    Raises:
        ConfigError: Arguments that do not fit one another, a loss of another shape, or a batch
            of which not even one sample fits in memory.
        ProbeError: The loss is not finite.
    """
    data, eval_data = as_data(train), None if eval is None else as_data(eval)
    plain = unwrapped(model)
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    progress("looking at the model and the data")
    fingerprint = take_fingerprint(
        plain, data, loss, task=task, device=device, world_size=world_size, count=count
    )
    batch_size, batch_why = choose_batch_size(data, world_size)
    length = asked_length(data, batch_size, fingerprint, steps, epochs)
    prober = Prober(
        plain, data, eval_data, loss,
        device=device, batch_size=batch_size // world_size, seed=seed, count=count,
    )  # fmt: skip
    with contextlib.closing(prober):
        found = Findings(prober, fingerprint, progress, own_optimizer=optimizer is not None)
        found.measure_step()
        if budget is not None:
            length = within_budget(budget, length, prober.time_step(), world_size)
        facts = found.facts(
            length.steps,
            epochs=length.steps * batch_size / len(data),
            fixed_steps=steps is not None,
            has_eval=eval_data is not None,
        )
        length = without_pruned(length, gates.decide(facts))
        found.measure_training(length.steps, length.steps * batch_size / len(data))
    made = Plan(
        fingerprint=fingerprint,
        run=RunPlan(
            steps=length.steps,
            batch_size=batch_size,
            micro_batch=prober.micro_batch,
            lr=found.lr[0] if found.lr else 0.0,
            why=f"{length.why}; {batch_why}",
        ),
        levers=gates.decide(dataclasses.replace(facts, steps=length.steps, lr=found.lr)),
        probes=found.record(length.steps),
    )
    if path is not None:
        made.write(path)
    return made
