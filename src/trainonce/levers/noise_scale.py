"""Batch size and rate adapted to how noisy the gradients are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import ConfigError
from trainonce.levers.base import Lever, LeverInfo
from trainonce.worker.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trainonce.levers.schedule import Schedule

_MOST_COORDINATES = 1 << 16


class NoiseScale(Lever):
    """Doubles the batch of an update when gradients have become noise, and raises the rate.

    The simple noise scale is B = tr(Σ)/|G|², the batch at which noise and signal are as large
    (McCandlish et al., An Empirical Model of Large-Batch Training, 2018, eq. 2.9). Gradients of
    consecutive updates have the same mean and independent noise, so their product estimates
    |G|², and what a gradient's own square exceeds it by is tr(Σ) over the batch. Both are
    averaged over updates, on a fixed random choice of coordinates: so it works in any loop,
    with any number of micro-batches.

    Events: `begin_step`, which sets the rates, and `end_step`, which looks at gradients and
    must come before they are cleared. After DDP's reduction gradients are equal on all ranks,
    and so are the decisions: nothing is communicated.

    ::

        lever = NoiseScale(optimizer, batch_size=256, schedule=schedule)   # all ranks together
        for step in range(...):
            lever.begin_step(step)
            for _ in range(lever.num_batches):          # loader batches of this update
                (loss_of(next(batches)) / lever.num_batches).backward()
            optimizer.step(); lever.end_step(step); optimizer.zero_grad()

    Args:
        optimizer: Its rates are multiplied by the square root of `num_batches` (Malladi et al.,
            On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, NeurIPS 2022).
        batch_size: Samples of one loader batch, all ranks together.
        schedule: Sets the rates of the same optimizer, before this; None: they are constant.
        most: Loader batches of an update at most; a power of two.
        every: Updates between decisions.
        smoothing: Of the averages: weight of what was before.
        enabled: False keeps one batch an update, and leaves the rates alone.

    Raises:
        ConfigError: A setting out of range.

    Attributes:
        num_batches: Loader batches that make the present update.
        noise_scale: The estimate, in samples; NaN until there is one.
    """

    info = LeverInfo(
        name="noise-scale",
        saves="no FLOPs: fewer and larger updates, for more devices at the same loss",
        source="McCandlish et al., 2018; published for batch warm-up: 43 % fewer updates (OLMo)",
        applies="more devices are at hand than a small batch keeps busy",
        hurts="one device: larger batches need more samples for the same loss",
        reversible=True,
        default_on=False,
    )

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        *,
        schedule: Schedule | None = None,
        most: int = 64,
        every: int = 50,
        smoothing: float = 0.95,
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        power = most >= 1 and most & (most - 1) == 0
        if batch_size < 1 or not power or every < 2 or not 0 <= smoothing < 1:
            raise ConfigError(
                f"no noise scale has {batch_size=}, {most=}, {every=}, {smoothing=}",
                hint="batch_size >= 1, most a power of two, every >= 2, 0 <= smoothing < 1",
            )
        self._optimizer = optimizer
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._schedule = schedule
        self._batch_size = batch_size
        self._most, self._every, self._smoothing = most, every, smoothing
        self.num_batches = 1
        self._square = self._product = 0.0
        self._count = 0
        self._last = torch.zeros(0)

    @property
    def noise_scale(self) -> float:
        """The estimate, in samples; NaN until there is one."""
        if self._count < 2 or self._product <= 0:
            return math.inf if self._count >= self._every else math.nan
        used = self._batch_size * self.num_batches
        return used * max(self._square - self._product, 0.0) / self._product

    def begin_step(self, step: int) -> None:
        """Set the rates of update number `step`."""
        if not self.enabled or self.num_batches == 1:
            return
        shape = self._schedule.factor(step) if self._schedule and self._schedule.enabled else 1.0
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * shape * math.sqrt(self.num_batches)

    def end_step(self, step: int) -> None:
        """Compare the gradient with that of the update before, and decide every so often."""
        del step
        if not self.enabled:
            return
        present, last = self._sample(), self._last
        self._last = present
        if not last.numel() == present.numel() > 0:
            return
        weight = self._smoothing if self._count else 0.0
        self._square += (1 - weight) * (float(present @ present) - self._square)
        self._product += (1 - weight) * (float(present @ last) - self._product)
        self._count += 1
        if self._count % self._every == 0 and self.num_batches < self._most:
            if self.noise_scale > self._batch_size * self.num_batches:
                self.num_batches *= 2
                self._count, self._last = 0, torch.zeros(0)  # other noise from here on

    @torch.no_grad()
    def _sample(self) -> torch.Tensor:
        """Return the gradient at the fixed coordinates, float64, shape (coordinates,)."""
        gradients = [p.grad for p in _parameters(self._optimizer) if p.grad is not None]
        total = sum(grad.numel() for grad in gradients)
        share = min(1.0, _MOST_COORDINATES / max(total, 1))
        parts: list[torch.Tensor] = []
        for index, grad in enumerate(gradients):
            flat = grad.flatten()
            wanted = max(math.ceil(share * len(flat)), 1)
            if wanted < len(flat):
                seed = derive_seed("noise-scale", index, len(flat))
                generator = torch.Generator().manual_seed(seed)
                chosen = torch.randint(len(flat), (wanted,), generator=generator)
                flat = flat[chosen.to(flat.device)]
            parts.append(flat.double().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def _state(self) -> dict[str, Any]:
        return {
            "num_batches": self.num_batches,
            "square": self._square,
            "product": self._product,
            "count": self._count,
            "last": self._last,
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.num_batches, self._count = int(state["num_batches"]), int(state["count"])
        self._square, self._product = float(state["square"]), float(state["product"])
        self._last = state["last"].clone()


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])
