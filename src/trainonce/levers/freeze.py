"""Progressive freezing: layers that have settled are no longer trained, from the input up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import ConfigError
from trainonce.levers.base import Lever, LeverInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Freeze(Lever):
    """Freezes a growing prefix of blocks, and with it ends the backward pass below.

    Events: `begin_step`, which freezes, and `end_step`, which looks at gradients and must
    come before they are cleared. The plasticity of the first block that is not frozen is the
    norm of its gradients over that of its weights, averaged over `window` updates. Once it
    has stayed below `threshold` of its first window for `patience` windows, the block is
    frozen, and the next one is watched. The last block is never frozen.

    Frozen parameters have `requires_grad=False` and no gradient, so that optimizers skip
    them, and frozen modules are in `eval()`, so that running statistics stay. DDP must be made
    with `find_unused_parameters=True`, or anew after a block was frozen (`num_frozen` grew).

    Args:
        blocks: In order from the input. Everything that comes before the last of them in the
            forward pass should be in one of them: what is left out is trained on, and holds
            the backward pass open.
        window: Updates over which plasticity is averaged.
        threshold: Share of the first window's plasticity that counts as settled.
        patience: Windows in a row.
        enabled: False trains everything; switched off in mid-run, it thaws what it froze.

    Raises:
        ConfigError: Fewer than two blocks, or a setting out of range.
    """

    info = LeverInfo(
        name="freeze",
        saves="17 % of FLOPs against tuned fine-tuning on digits, missing equal quality; a first "
        "block computed once and stored: 9 % at equal quality (benchmarks/levers)",
        source="Wang et al., Egeria, EuroSys 2023; Liu et al., AutoFreeze, 2021 (gradient norms)",
        applies="fine-tuning a pretrained model on data like that it was trained on",
        hurts="training from scratch (measured negative), and a large shift of domain",
        reversible=True,
        default_on=False,
    )

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        *,
        window: int = 50,
        threshold: float = 0.3,
        patience: int = 2,
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        if len(blocks) < 2 or window < 1 or not 0 < threshold < 1 or patience < 1:
            raise ConfigError(
                f"cannot freeze {len(blocks)} blocks with {window=}, {threshold=}, {patience=}",
                hint="two blocks or more, window and patience >= 1, 0 < threshold < 1",
            )
        self._blocks = list(blocks)
        # What was frozen by its owner stays so when this lever is switched off.
        self._trained = [[p for p in b.parameters() if p.requires_grad] for b in self._blocks]
        self._window = window
        self._threshold = threshold
        self._patience = patience
        self.num_frozen = 0
        self._first = self._sum = 0.0
        self._count = self._calm = 0

    def begin_step(self, step: int) -> None:
        """Put the frozen prefix in force; `model.train()` may have undone part of it."""
        del step
        for index, block in enumerate(self._blocks):
            frozen = self.enabled and index < self.num_frozen
            was_frozen = any(not p.requires_grad for p in self._trained[index])
            for parameter in self._trained[index]:
                parameter.requires_grad_(not frozen)
                if frozen:
                    parameter.grad = None
            if frozen:
                block.eval()
            elif was_frozen:
                block.train()

    def end_step(self, step: int) -> None:
        """Measure the plasticity of the first block that is not frozen."""
        del step
        if not self.enabled or self.num_frozen >= len(self._blocks) - 1:
            return
        self._sum += self._plasticity(self._trained[self.num_frozen])
        self._count += 1
        if self._count < self._window:
            return
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        if not self._first:
            self._first = mean
        self._calm = self._calm + 1 if mean < self._threshold * self._first else 0
        if self._calm >= self._patience:
            self.num_frozen += 1
            self._first, self._calm = 0.0, 0

    @staticmethod
    @torch.no_grad()
    def _plasticity(parameters: list[torch.nn.Parameter]) -> float:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return 0.0
        norms = torch.nn.utils.get_total_norm
        return float(norms(gradients) / norms(parameters).clamp(min=1e-12))

    def _state(self) -> dict[str, Any]:
        return {
            "num_frozen": self.num_frozen,
            "first": self._first,
            "sum": self._sum,
            "count": self._count,
            "calm": self._calm,
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.num_frozen = int(state["num_frozen"])
        self._first, self._sum = float(state["first"]), float(state["sum"])
        self._count, self._calm = int(state["count"]), int(state["calm"])
        self.begin_step(0)
