"""Digits: 1,797 images of 8×8 pixels, and a small convolutional network.

Shapes: B images of a batch; images (B, 1, 8, 8), logits (B, 10).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from trainonce.errors import ConfigError
from trainonce.levers.harness import Recipe
from trainonce.levers.infobatch import InfoBatch
from trainonce.levers.optimizer import muon_adamw
from trainonce.levers.schedule import Schedule
from trainonce.worker.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainonce.levers.usage import UsageMeter

_TRAIN, _TUNING = 1000, 398
_BACKGROUND = -0.3


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe:
    """How to train on digits.

    Args:
        optimizer: "adam" (no weight decay), "adamw" or "muon".
        lr: Peak rate.
        epochs: Passes over the training data; may be a fraction.
        schedule: Warm-up and decay to zero; else a constant rate.
        infobatch: Probability of leaving an easy sample out; 0 for none.
        subset: Share of the training data, drawn at random.
        batch: Samples of an update.
        ns_steps: Newton-Schulz steps of Muon.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    epochs: float = 24
    schedule: bool = False
    infobatch: float = 0.0
    subset: float = 1.0
    batch: int = 64
    ns_steps: int = 5


class DigitsNet(nn.Module):
    """Four convolutions, each with batch norm, and a linear layer on their mean.

    Args:
        width: Channels of the first convolution; the later ones have 2, 4 and 4 times that.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [1, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(fan_out), nn.ReLU()]
            if index == 1:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 10) of images (B, 1, 8, 8)."""
        return self.head(self.body(images).mean((2, 3)))


class Digits:
    """The task; see `trainonce.levers.harness.Task`.

    Args:
        width: Of the network.
        split_seed: Which images are for training, tuning and reporting.

    Raises:
        ConfigError: scikit-learn, which has the images, is not installed.
    """

    name = "digits"
    metric = "nll"
    margin = 0.01

    def __init__(self, width: int = 8, split_seed: int = 0) -> None:
        try:
            from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
        except ImportError as error:
            raise ConfigError(
                "scikit-learn is not installed", hint="pip install 'trainonce[examples]'"
            ) from error
        data: Any = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 + _BACKGROUND
        labels = torch.tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split_seed))
        train, tuning, reporting = order.split([_TRAIN, _TUNING, len(order) - _TRAIN - _TUNING])
        self._train = images[train], labels[train]
        self._splits = {
            "tuning": (images[tuning], labels[tuning]),
            "reporting": (images[reporting], labels[reporting]),
        }
        self._width = width
        self._split_seed = split_seed

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on beside the recipe."""
        return {"width": self._width, "split_seed": self._split_seed, "train_samples": _TRAIN}

    def shorter(self, recipe: Recipe, share: float) -> Recipe:
        """Return the recipe with fewer epochs."""
        epochs = recipe.settings["epochs"] * share
        return recipe.changed(f"{share:.0%} long", epochs=epochs)

    def subset(self, recipe: Recipe, share: float) -> Recipe:
        """Return the recipe on part of the data."""
        return recipe.changed(f"{share:.0%} of data", subset=share)

    def train(
        self, recipe: Mapping[str, Any], seed: int, split: str, meter: UsageMeter
    ) -> dict[str, float]:
        """Train once; return the error in percent and the negative log-likelihood in nats."""
        how = DigitsRecipe(**recipe)
        torch.manual_seed(derive_seed("digits", seed))
        model = DigitsNet(self._width)
        with meter.running():
            self._train_model(model, how, seed, meter)
        return evaluate(model, *self._splits[split])

    def _train_model(
        self, model: DigitsNet, how: DigitsRecipe, seed: int, meter: UsageMeter
    ) -> None:
        images, labels = self._part(how.subset, seed)
        decay = 0.0 if how.optimizer == "adam" else 0.05
        optimizer = muon_adamw(
            model,
            how.lr,
            enabled=how.optimizer == "muon",
            weight_decay=decay,
            betas=(0.9, 0.999),
            ns_steps=how.ns_steps,
        )
        steps_per_epoch = max(len(labels) // how.batch, 1)
        total = max(round(how.epochs * steps_per_epoch), 1)
        schedule = Schedule(optimizer, total, warmup=0.15, enabled=how.schedule)
        sampler = InfoBatch(
            len(labels),
            math.ceil(how.epochs),
            ratio=how.infobatch,
            seed=seed,
            enabled=how.infobatch > 0,
        )
        generator = torch.Generator().manual_seed(derive_seed("shift", seed))

        def update(x: torch.Tensor, y: torch.Tensor, chosen: torch.Tensor) -> None:
            losses = F.cross_entropy(model(x), y, reduction="none")
            sampler.reduce_loss(losses, chosen).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for epoch in range(math.ceil(how.epochs)):
            sampler.set_epoch(epoch)
            batches = [b for b in sampler.order().split(how.batch) if len(b) == how.batch]
            for index, chosen in enumerate(batches):
                # A pruned epoch has fewer updates; the schedule goes by the share of it.
                step = epoch * steps_per_epoch + index * steps_per_epoch // len(batches)
                if step >= total:
                    return
                schedule.begin_step(step)
                x, y = _shift(images[chosen], generator), labels[chosen]
                meter.step(
                    (how.optimizer, len(x)),
                    lambda x=x, y=y, chosen=chosen: update(x, y, chosen),
                    samples=len(x),
                )

    def _part(self, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self._train
        generator = torch.Generator().manual_seed(derive_seed("subset", seed))
        chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
        return images[chosen], labels[chosen]


def _shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move a batch by up to one pixel in both directions."""
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    padded = F.pad(images, (1, 1, 1, 1), value=_BACKGROUND)
    return padded[:, :, down : down + 8, right : right + 8]


@torch.no_grad()
def evaluate(model: DigitsNet, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the negative log-likelihood in nats and the error in percent."""
    model.eval()
    logits = model(images)
    return {
        "nll": F.cross_entropy(logits, labels).item(),
        "error_percent": 100 * (logits.argmax(1) != labels).float().mean().item(),
    }


def _recipe(name: str, **changes: Any) -> Recipe:
    return Recipe(name, dataclasses.asdict(DigitsRecipe(**changes)))


def default() -> Recipe:
    """Return what somebody would write without thinking about it."""
    return _recipe("adam 1e-3, 24 epochs")


def baseline(grid: str) -> list[Recipe]:
    """Return AdamW with decay to zero, over rates, batch sizes and horizons."""
    if grid == "small":
        return [_named("adamw", 1e-2, 64, epochs) for epochs in (8, 16)]
    horizons = {16: (12, 16, 24), 32: (3, 4, 5, 6, 9, 12, 16, 24), 64: (4, 6, 9, 12, 16, 24)}
    return [
        _named("adamw", lr, batch, epochs)
        for batch, lengths in horizons.items()
        for epochs in lengths
        for lr in (1e-2, 2e-2)
    ]


def candidates(grid: str) -> list[Recipe]:
    """Return Muon, InfoBatch, and both, over rates, batch sizes and horizons."""
    if grid == "small":
        muon = [_named("muon", 2e-2, 64, epochs) for epochs in (5, 8)]
        return [*muon, _named("adamw", 1e-2, 64, 16, infobatch=0.5)]
    horizons = {32: (3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 16), 64: (9, 12, 14, 16)}
    muon = [
        _named("muon", lr, batch, epochs)
        for batch, lengths in horizons.items()
        for epochs in lengths
        for lr in (2e-2, 4e-2, 8e-2)
    ]
    fewer_steps = [
        _named("muon", lr, batch, epochs, ns_steps=2)
        for lr, batch in ((1e-2, 16), (2e-2, 16), (4e-2, 16), (2e-2, 32), (4e-2, 32))
        for epochs in (3, 10, 12, 14, 16)
    ]
    pruned = [_named("adamw", 1e-2, 32, epochs, infobatch=0.5) for epochs in (12, 16, 24)]
    both = [_named("muon", 4e-2, 32, n, infobatch=0.5) for n in (9, 12, 16)]
    return [*muon, *fewer_steps, *pruned, *both]


def _named(
    optimizer: str,
    lr: float,
    batch: int,
    epochs: int,
    infobatch: float = 0.0,
    ns_steps: int = 5,
) -> Recipe:
    name = optimizer if ns_steps == 5 else f"{optimizer} ({ns_steps} steps)"
    pruned = " + infobatch" if infobatch else ""
    return _recipe(
        f"{name} {lr:g}{pruned}, batch {batch}, {epochs} epochs",
        ns_steps=ns_steps,
        optimizer=optimizer,
        lr=lr,
        batch=batch,
        epochs=epochs,
        schedule=True,
        infobatch=infobatch,
    )
