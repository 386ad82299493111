"""Fine-tuning: a network that knows the digits 0 to 4 learns 5 to 9.

Shapes: B images of a batch; images (B, 1, 8, 8), features (B, C, H, W), logits (B, 5).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from trainonce.levers.bench.digits import Digits, DigitsNet, evaluate
from trainonce.levers.freeze import Freeze
from trainonce.levers.harness import Recipe
from trainonce.levers.optimizer import muon_adamw
from trainonce.levers.schedule import Schedule
from trainonce.worker.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainonce.levers.usage import UsageMeter

_FIRST_NEW = 5
_PRETRAIN_EPOCHS = 10
# Layers of `DigitsNet.body` by block: convolution, norm, activation, and the pooling.
_BLOCK_ENDS = (3, 7, 10, 13)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """How to fine-tune.

    Args:
        optimizer: "adam" (no weight decay) or "adamw".
        lr: Peak rate.
        epochs: Passes over the training data; may be a fraction.
        schedule: Warm-up and decay to zero; else a constant rate.
        freeze: Threshold of progressive freezing; 0 for none.
        prefix: Blocks frozen from the start, whose output is computed once and kept.
        subset: Share of the training data, drawn at random.
        batch: Samples of an update.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    epochs: float = 20
    schedule: bool = False
    freeze: float = 0.0
    prefix: int = 0
    subset: float = 1.0
    batch: int = 32


class Finetune(Digits):
    """The task; see `trainonce.levers.harness.Task`.

    Pretraining is the same for every recipe of a seed and is not counted.

    Args:
        width: Of the network.
        split_seed: Which images are for training, tuning and reporting.
    """

    name = "finetune"

    def __init__(self, width: int = 8, split_seed: int = 0) -> None:
        super().__init__(width, split_seed)
        self._pretrained: dict[int, dict[str, torch.Tensor]] = {}
        old = self._train[1] < _FIRST_NEW
        self._old = self._train[0][old], self._train[1][old]
        self._train = _only_new(*self._train)
        self._splits = {name: _only_new(*split) for name, split in self._splits.items()}

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on beside the recipe."""
        return {
            **super().settings(),
            "train_samples": len(self._train[1]),
            "pretrain_samples": len(self._old[1]),
            "pretrain_epochs": _PRETRAIN_EPOCHS,
        }

    def train(
        self, recipe: Mapping[str, Any], seed: int, split: str, meter: UsageMeter
    ) -> dict[str, float]:
        """Fine-tune once; return the error in percent and the negative log-likelihood in nats."""
        how = FinetuneRecipe(**recipe)
        if seed not in self._pretrained:
            self._pretrained[seed] = self._pretrain(seed)
        torch.manual_seed(derive_seed("finetune", seed))
        model = DigitsNet(self._width)
        model.head = nn.Linear(4 * self._width, 5)
        model.body.load_state_dict(self._pretrained[seed])
        with meter.running():
            self._finetune(model, how, seed, meter)
        return evaluate(model, *self._splits[split])

    def _pretrain(self, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(derive_seed("pretrain", seed))
        model = DigitsNet(self._width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        images, labels = self._old
        steps = len(labels) // 32
        schedule = Schedule(optimizer, _PRETRAIN_EPOCHS * steps)
        for epoch in range(_PRETRAIN_EPOCHS):
            order = torch.randperm(len(labels))
            for index, chosen in enumerate(order[: steps * 32].split(32)):
                schedule.begin_step(epoch * steps + index)
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return model.body.state_dict()

    def _finetune(
        self, model: DigitsNet, how: FinetuneRecipe, seed: int, meter: UsageMeter
    ) -> None:
        images, labels = self._part(how.subset, seed)
        cut = _BLOCK_ENDS[how.prefix - 1] if how.prefix else 0
        below, above = model.body[:cut], nn.Sequential(model.body[cut:], Mean(), model.head)
        model.requires_grad_(True)
        below.requires_grad_(False).eval()  # its statistics are those it was trained with
        if cut:
            inputs = meter.step(("prefix", cut, len(images)), lambda: _features(below, images))
        else:
            inputs = images
        decay = 0.0 if how.optimizer == "adam" else 0.05
        optimizer = muon_adamw(above, how.lr, enabled=False, weight_decay=decay, betas=(0.9, 0.999))
        steps_per_epoch = max(len(labels) // how.batch, 1)
        total = max(round(how.epochs * steps_per_epoch), 1)
        schedule = Schedule(optimizer, total, warmup=0.1, enabled=how.schedule)
        ends = (0, *_BLOCK_ENDS)
        blocks = [model.body[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        freeze = Freeze(
            [*blocks, model.head],
            window=steps_per_epoch,
            threshold=how.freeze or 0.5,
            patience=1,
            enabled=how.freeze > 0,
        )

        def update(x: torch.Tensor, y: torch.Tensor, step: int) -> None:
            F.cross_entropy(above(x), y).backward()
            freeze.end_step(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        generator = torch.Generator().manual_seed(derive_seed("order", seed))
        step = 0
        for _ in range(math.ceil(how.epochs)):
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order[: steps_per_epoch * how.batch].split(how.batch):
                if step == total:
                    return
                schedule.begin_step(step)
                if freeze.enabled:
                    freeze.begin_step(step)
                x, y = inputs[chosen], labels[chosen]
                key = (how.prefix, freeze.num_frozen, len(x))
                meter.step(key, lambda x=x, y=y, s=step: update(x, y, s), samples=len(x))
                step += 1


class Mean(nn.Module):
    """The mean over height and width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C) for (B, C, H, W)."""
        return x.mean((2, 3))


@torch.no_grad()
def _features(below: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return below(images)


def _only_new(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    new = labels >= _FIRST_NEW
    return images[new], labels[new] - _FIRST_NEW


def _recipe(name: str, **changes: Any) -> Recipe:
    return Recipe(name, dataclasses.asdict(FinetuneRecipe(**changes)))


def default() -> Recipe:
    """Return what somebody would write without thinking about it."""
    return _recipe("adam 1e-3, 20 epochs")


def baseline(grid: str) -> list[Recipe]:
    """Return AdamW with decay to zero on all layers, over rates and horizons."""
    rates, horizons = {
        "small": ((5e-3,), (6, 12)),
        "full": ((5e-3, 1e-2, 2e-2), (4, 6, 9, 14, 20)),
    }[grid]
    return [
        _recipe(f"adamw {lr:g}, {n} epochs", optimizer="adamw", lr=lr, epochs=n, schedule=True)
        for n in horizons
        for lr in rates
    ]


def candidates(grid: str) -> list[Recipe]:
    """Return progressive freezing, and a prefix that is computed once, over rates and horizons."""
    how, rates, horizons = {
        "small": (((0.7, 0), (0.0, 1)), (5e-3,), (6,)),
        "full": (((0.8, 0), (0.0, 1), (0.0, 2)), (1e-2, 2e-2), (4, 6, 9, 14, 20)),
    }[grid]
    return [
        _recipe(
            f"adamw {lr:g} + "
            + (f"first {prefix} blocks stored" if prefix else f"freeze {threshold:g}")
            + f", {epochs} epochs",
            optimizer="adamw",
            lr=lr,
            epochs=epochs,
            schedule=True,
            freeze=threshold,
            prefix=prefix,
        )
        for threshold, prefix in how
        for lr in rates
        for epochs in horizons
    ]
