"""The precision of training: strict and slow, fast, or chosen by measuring the user's own step."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import ConfigError
from trainonce.levers.base import Lever, LeverInfo
from trainonce.levers.usage import stopwatch
from trainonce.settings import PRECISION

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

MODES = ("fp32-strict", "tf32", "bf16", "fp16")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# A faster mode must be faster by this much, or noise decides.
_LEAST_GAIN = 0.05


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """What `Precision.choose` measured.

    Args:
        mode: What was chosen.
        reason: Why, in one sentence.
        step_s: Mode to the median seconds of a step; infinite where a loss was not finite.
    """

    mode: str
    reason: str
    step_s: dict[str, float]


class Precision(Lever):
    """Runs the forward pass in a precision, and scales the loss where that needs it.

    Events: `autocast`, `scale_loss`, `update`. The process-wide flags (TF32, deterministic
    algorithms) hold within `flags()`, and are given back after it.

    ::

        precision = Precision("bf16", device=run.device)
        with precision.flags():
            for batch in loader:
                with precision.autocast():
                    loss = loss_of(model(batch))
                precision.scale_loss(loss).backward()
                precision.update(optimizer)

    Modes: "fp32-strict" is bit for bit repeatable: deterministic algorithms only, no TF32.
    "tf32" allows TF32 in matrix products and convolutions of CUDA devices. "bf16" and "fp16"
    are autocast, with TF32 for what stays float32; "fp16" scales the loss, and skips updates
    whose gradients overflow. "auto" is decided by `choose`, and is "tf32" until then.

    Args:
        mode: One of the above. None takes `TRAINONCE_PRECISION`, else "auto".
        device: Where the model is.
        enabled: False does nothing at all: torch's own defaults.

    Raises:
        ConfigError: There is no such mode, or the device cannot do it.
    """

    info = LeverInfo(
        name="precision",
        saves="step time where matrix units serve bf16 (1.4-3.2x in an earlier study, whose runs "
        "are not committed); nothing, or the reverse, for small models: so it is measured first",
        source="Micikevicius et al., Mixed Precision Training, ICLR 2018; Kalamkar et al., 2019",
        applies="large matrix products on hardware with units for the dtype",
        hurts="small tensors (conversions cost more than is gained); fp16 under- and overflows",
        reversible=True,
        default_on=True,
    )

    def __init__(
        self,
        mode: str | None = None,
        *,
        device: torch.device | str = "cpu",
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        wanted, origin = mode, "as given"
        if wanted is None:
            wanted, origin = PRECISION.get() or "auto", f"from {PRECISION.name}"
        if wanted not in (*MODES, "auto"):
            raise ConfigError(
                f"there is no precision {wanted!r} ({origin})",
                hint="one of " + ", ".join((*MODES, "auto")),
            )
        self._device = torch.device(device)
        self._auto = wanted == "auto"
        self.mode = "tf32" if self._auto else wanted
        _check(self.mode, self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self.mode == "fp16")

    @property
    def undecided(self) -> bool:
        """Whether the mode is "auto", and `choose` has not been called."""
        return self._auto

    def choose(
        self,
        step: Callable[[Precision], torch.Tensor],
        *,
        modes: tuple[str, ...] = ("tf32", "bf16"),
        repeats: int = 5,
        restore: Callable[[], None] = lambda: None,
    ) -> PrecisionChoice:
        """Decide "auto" by timing the user's own step in each mode, and use the fastest.

        The first mode is kept unless another is at least 5 % faster and its losses are
        finite. Only a given "auto" is decided: any other mode is returned as it is. Under
        several ranks, call it on one and broadcast the mode, so that all agree.

        Args:
            step: Runs forward, backward and update with the precision it is given, and
                returns the loss.
            modes: What to try; the first is the fall-back.
            repeats: Timed steps a mode, after one to warm up. Modes take turns, so that
                a load that comes and goes hits all alike.
            restore: Puts model and optimizer back as they were; called after the last step.

        Raises:
            ConfigError: No mode trains with a finite loss.
        """
        if not self._auto:
            return PrecisionChoice(mode=self.mode, reason="as given", step_s={})
        trials = {mode: Precision(mode, device=self._device) for mode in modes}
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        finite = dict.fromkeys(modes, True)
        for _ in range(repeats + 1):
            for mode, trial in trials.items():
                with trial.flags(), stopwatch(self._device) as elapsed:
                    loss = step(trial)
                finite[mode] &= bool(torch.isfinite(loss.detach()).all())
                times[mode].append(elapsed())
        restore()
        step_s = {
            m: sorted(t[1:])[repeats // 2] if finite[m] else torch.inf for m, t in times.items()
        }
        choice = _fastest(step_s)
        self._auto = False
        self.mode = choice.mode
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self.mode == "fp16")
        return choice

    @contextlib.contextmanager
    def flags(self) -> Generator[None]:
        """Set the process-wide flags of the mode, and give them back as they were.

        Raises:
            ConfigError: "fp32-strict" on CUDA after cuBLAS chose its workspace.
        """
        if not self.enabled:
            yield
            return
        strict = self.mode == "fp32-strict"
        backends = _tf32_switches()
        before = [backend.fp32_precision for backend in backends]
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        benchmark = torch.backends.cudnn.benchmark
        if strict:
            _reserve_workspace(self._device)
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        for backend in backends:
            backend.fp32_precision = "ieee" if strict else "tf32"
        try:
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.benchmark = benchmark

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for the forward pass and the loss."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mode)
        if not self.enabled or dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to call `backward()` on; scaled in fp16."""
        return self._scaler.scale(loss) if self.enabled else loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring gradients to their true size, before clipping them."""
        if self.enabled:
            self._scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step `optimizer`; in fp16, not if a gradient overflowed."""
        if not self.enabled or self.mode != "fp16":
            return False
        self._scaler.step(optimizer)
        self._scaler.update()
        return True

    def _state(self) -> dict[str, Any]:
        return {"mode": self.mode, "auto": self._auto, "scaler": self._scaler.state_dict()}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        _check(state["mode"], self._device)
        self.mode, self._auto = state["mode"], state["auto"]
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self.mode == "fp16")
        if self.mode == "fp16":
            self._scaler.load_state_dict(dict(state["scaler"]))


def _fastest(step_s: Mapping[str, float]) -> PrecisionChoice:
    first = next(iter(step_s))
    best = min(step_s, key=lambda mode: step_s[mode])
    if step_s[best] == torch.inf:
        raise ConfigError(
            f"the loss was not finite in any of {', '.join(step_s)}",
            hint="check the step in fp32-strict",
        )
    if best != first and step_s[best] > (1 - _LEAST_GAIN) * step_s[first]:
        best = first
    others = ", ".join(f"{m} {s / step_s[best]:.2f}x" for m, s in step_s.items() if m != best)
    return PrecisionChoice(
        mode=best, reason=f"{best} by the step's own time; {others}", step_s=dict(step_s)
    )


def _tf32_switches() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn  # its parts are made at run time, unknown to type checkers
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _check(mode: str, device: torch.device) -> None:
    if mode == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"{device} has no bfloat16", hint="take fp16 or tf32")


def _reserve_workspace(device: torch.device) -> None:
    """Make cuBLAS deterministic, which it reads from the environment when it starts."""
    if device.type != "cuda" or os.environ.get(_CUBLAS) in (":4096:8", ":16:8"):
        return
    if torch.cuda.is_initialized():
        raise ConfigError(
            "fp32-strict needs cuBLAS in a deterministic mode, and CUDA has started already",
            hint=f"export {_CUBLAS}=:4096:8 before the script starts",
        )
    os.environ[_CUBLAS] = ":4096:8"
