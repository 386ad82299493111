"""What the entries of a plan become: levers, an optimizer, and changes of the model."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.levers.batches import blocks_of, call_model, to_device, unwrapped
from trainonce.levers.early_stop import EarlyStop
from trainonce.levers.fingerprint import kept
from trainonce.levers.freeze import Freeze
from trainonce.levers.infobatch import InfoBatch
from trainonce.levers.noise_scale import NoiseScale
from trainonce.levers.optimizer import muon_adamw
from trainonce.levers.precision import Precision
from trainonce.levers.quantized import quantized_training
from trainonce.levers.recompute import recompute, recompute_all
from trainonce.levers.schedule import Schedule
from trainonce.levers.sequence import SequenceWarmup

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import torch

    from trainonce.levers.base import Lever
    from trainonce.levers.batches import Data, Loss
    from trainonce.levers.plan_file import Plan
    from trainonce.levers.recompute import Recomputing


def build_levers(
    plan: Plan, model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Data,
    *, device: torch.device, seed: int,
) -> dict[str, Lever]:  # fmt: skip
    """Return the levers of a plan that act while it trains, in the registry's order.

    Precision and schedule are always among them; off, they do nothing.

    Raises:
        ConfigError: Settings of the plan that a lever cannot use.
    """
    levers: dict[str, Lever] = {}

    def settings(name: str) -> dict[str, Any]:
        return {**plan.settings(name), "enabled": plan.is_on(name)}

    def add(name: str, lever: Callable[..., Lever], *args: Any, **more: Any) -> None:
        if plan.is_on(name):
            levers[name] = lever(*args, **more, **settings(name))

    steps = plan.run.steps
    with _known_settings():
        mode = settings("precision")
        levers["precision"] = Precision(mode.pop("mode", None), device=device, **mode)
        schedule = Schedule(optimizer, steps, **settings("schedule"))
        levers["schedule"] = schedule
        add("noise-scale", NoiseScale, optimizer, plan.run.batch_size, schedule=schedule)
        add("sequence-warmup", SequenceWarmup, plan.fingerprint.sequence_length, steps)
        add("infobatch", InfoBatch, len(data), seed=seed)
        add("freeze", Freeze, blocks_of(model))
        add("early-stop", EarlyStop, schedule=schedule, wait_for=list(levers.values()))
    return levers


def build_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a plan: Muon with AdamW, or AdamW."""
    weight_decay = float(plan.settings("optimizer").get("weight_decay", 0.01))
    on = plan.is_on("optimizer")
    return muon_adamw(unwrapped(model), plan.run.lr, enabled=on, weight_decay=weight_decay)


def quantize(plan: Plan, model: torch.nn.Module) -> None:
    """Have the model's matrix products computed in few bits, where the plan says so."""
    if plan.is_on("quantized"):
        with _known_settings():
            quantized_training(model, **plan.settings("quantized"))


def recompute_blocks(
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
        with _known_settings():
            return recompute(blocks_of(model), forward, **settings)


@contextlib.contextmanager
def _known_settings() -> Generator[None]:
    """Turn what a lever says to arguments that it does not have into an error of the plan."""
    try:
        yield
    except TypeError as error:
        raise ConfigError(
            f"a lever has settings in the plan that it does not know: {error}",
            hint="see docs/levers.md, or make the plan anew",
        ) from error
