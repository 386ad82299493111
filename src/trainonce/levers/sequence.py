"""Short sequences first, at a constant number of tokens a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import ConfigError
from trainonce.levers.base import Lever, LeverInfo

if TYPE_CHECKING:
    from collections.abc import Mapping


class SequenceWarmup(Lever):
    """Cuts the sequences of a batch into shorter ones while training begins.

    Events: `begin_step`, `shape_batch`. A batch of B sequences of T tokens becomes one of
    B·T/L sequences of L tokens, for L growing from `shortest` to T: every token is trained on
    in every step, and only attention across the cuts is left out. L takes the divisors of T
    only, so that nothing is dropped or padded.

    Args:
        length: T, the full length.
        total_steps: Length of the run.
        ramp: Share of the run during which sequences are shorter.
        shortest: First L is at least this.
        enabled: False leaves batches alone.

    Raises:
        ConfigError: The arguments make no ramp.
    """

    info = LeverInfo(
        name="sequence-warmup",
        saves="34 % of FLOPs and 58 % of CPU time of a small language model, together with Muon, "
        "against tuned AdamW (benchmarks/levers)",
        source="Li et al., The Stability-Efficiency Dilemma, NeurIPS 2022; Composer",
        applies="decoder language models",
        hurts="tasks whose answer needs the whole sequence; positions that are learned",
        reversible=True,
        default_on=False,
    )

    def __init__(
        self,
        length: int,
        total_steps: int,
        *,
        ramp: float = 0.3,
        shortest: int = 16,
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        if not 1 <= shortest <= length or not 0 <= ramp <= 1 or total_steps < 1:
            raise ConfigError(
                f"no ramp has {length=}, {shortest=}, {ramp=}, {total_steps=}",
                hint="1 <= shortest <= length, 0 <= ramp <= 1, total_steps >= 1",
            )
        self.full_length = length
        self._lengths = [n for n in range(shortest, length + 1) if length % n == 0]
        self._ramp_steps = round(ramp * total_steps)
        self._step = 0

    def length(self, step: int) -> int:
        """Return the sequence length of update number `step`, from 0."""
        if not self.enabled or step >= self._ramp_steps:
            return self.full_length
        return self._lengths[step * len(self._lengths) // self._ramp_steps]

    def begin_step(self, step: int) -> None:
        """Take note of the step."""
        self._step = step

    def shape_batch(self, batch: Any) -> Any:
        """Return the batch, its sequences cut to this step's length.

        Args:
            batch: A tensor of shape (B, T, ...), or a tuple, list or dict with such tensors;
                anything of another shape is left alone.

        Returns:
            The same with shape (B·T/L, L, ...), views where that is possible.

        Raises:
            ConfigError: No tensor has the full length in dim 1.
        """
        length = self.length(self._step)
        if length == self.full_length:
            return batch
        found: list[bool] = []
        shaped = self._cut(batch, length, found)
        if not found:
            raise ConfigError(
                f"no tensor of the batch has {self.full_length} tokens in dim 1",
                hint="give SequenceWarmup the length of the batches",
            )
        return shaped

    def _cut(self, part: Any, length: int, found: list[bool]) -> Any:
        if isinstance(part, torch.Tensor):
            if part.ndim < 2 or part.shape[1] != self.full_length:
                return part
            found.append(True)
            return part.reshape(-1, length, *part.shape[2:])
        if isinstance(part, dict):
            return {key: self._cut(value, length, found) for key, value in part.items()}  # pyright: ignore[reportUnknownVariableType]
        if isinstance(part, list | tuple):
            return type(part)([self._cut(value, length, found) for value in part])  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType, reportCallIssue]
        return part

    def ramping(self, step: int) -> bool:
        """Tell whether sequences are still shorter."""
        return self.length(step) != self.full_length

    def _state(self) -> dict[str, Any]:
        return {"step": self._step}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
