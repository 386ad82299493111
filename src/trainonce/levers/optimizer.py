"""Muon for hidden matrices with AdamW for the rest, as one optimizer, behind an overhead gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from trainonce.errors import ConfigError
from trainonce.levers.base import LeverInfo, describes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Newton-Schulz iteration towards the nearest semi-orthogonal matrix (Jordan et al., 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_EPS = 1e-7
MAX_OVERHEAD = 0.1


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which optimizer gets which parameters.

    Args:
        hidden: Matrices and convolution kernels between the first and the last layer.
        rest: Embeddings, the output layer, biases, gains.
    """

    hidden: list[tuple[str, torch.nn.Parameter]]
    rest: list[tuple[str, torch.nn.Parameter]]


def split_parameters(model: torch.nn.Module, *, exclude: Iterable[str] = ()) -> Split:
    """Split the parameters that are trained into hidden matrices and the rest.

    Hidden are weights of two or more dims in linear and convolution layers (and plain
    parameters of attention), save those of the first and the last such layer, which face
    data and classes, and those tied to an embedding.

    Args:
        model: May be wrapped in DDP. Layers count in order of registration.
        exclude: Parts of names; a parameter whose name has one goes to the rest.
    """
    embedded = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
    }
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [name for name, p in named if p.ndim >= 2 and id(p) not in embedded]
    # An embedding is the first layer where there is one; the last matrix is the output.
    ends = {matrices[-1]} if matrices else set[str]()
    if matrices and not embedded:
        ends.add(matrices[0])
    words = tuple(exclude)
    hidden = [
        (name, p)
        for name, p in named
        if name in matrices and name not in ends and not any(word in name for word in words)
    ]
    chosen = {name for name, _ in hidden}
    return Split(hidden=hidden, rest=[(name, p) for name, p in named if name not in chosen])


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups marked `muon=True`, AdamW for the others.

    One rate serves both: Muon's update is scaled by 0.2·√max(rows, columns), to the size of
    AdamW's (Liu et al., Muon is Scalable for LLM Training, 2025). Weights of more than two
    dims are flattened after the first, which `torch.optim.Muon` refuses; on matrices the
    numbers are those of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`. Gradients are
    taken as they are, so under DDP all ranks do the same.

    Args:
        params: Groups; `muon` (False), `momentum` (0.95), `ns_steps` (5) and `ns_dtype` beside
            AdamW's keys.
            `ns_dtype` is the dtype of the orthogonalisation; None takes bfloat16 on CUDA, as
            torch's own Muon does, and the parameter's dtype elsewhere.
        lr: Rate of groups that name none.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Decoupled, for both.

    Attributes:
        reason: Why Muon is on or off, where `muon_adamw` decided it.

    Raises:
        ConfigError: A Muon group holds a vector, or a sharded parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "muon": False,
            "momentum": 0.95,
            "ns_dtype": None,
            "ns_steps": _STEPS,
        }
        super().__init__(params, defaults)
        self.reason = "as given"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["muon"]:
            for parameter in group["params"]:
                _check_muon(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; return the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in trained:
                    self._step_muon(parameter, group)
            elif trained:
                self._step_adamw(trained, group)
        return loss

    def _step_muon(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(state["momentum_buffer"], group["momentum"])  # Nesterov
        direction = orthogonalise(update.flatten(1), group["ns_dtype"], steps=group["ns_steps"])
        scale = 0.2 * math.sqrt(max(direction.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.view_as(parameter), alpha=float(-group["lr"] * scale))

    def _step_adamw(self, trained: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in trained:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in trained]
        adamw(
            trained,
            [p.grad for p in trained if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(
    matrix: torch.Tensor, dtype: torch.dtype | None = None, *, steps: int = _STEPS
) -> torch.Tensor:
    """Return a matrix with `matrix`'s singular vectors and singular values near 1.

    Newton-Schulz steps with the coefficients of Jordan et al. (2024): after five, singular
    values come to lie between about 0.7 and 1.2; after fewer, small ones stay smaller.

    Args:
        matrix: Shape (rows, columns), not changed.
        dtype: To compute in; see `MuonAdamW`.
        steps: Of Newton-Schulz.

    Returns:
        The same shape, in the dtype of `matrix`.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrix.is_cuda else matrix.dtype
    tall = matrix.size(0) > matrix.size(1)
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.T if tall else x).to(matrix.dtype)


def muon_flops(parameters: Iterable[torch.Tensor], steps: int = _STEPS) -> int:
    """Return the FLOPs that one Muon update of `parameters` adds.

    steps·(4n²m + 2n³) for a weight flattened to n × m with n ≤ m.
    """
    total = 0
    for parameter in parameters:
        n, m = sorted((parameter.shape[0], parameter.numel() // parameter.shape[0]))
        total += steps * (4 * n * n * m + 2 * n**3)
    return total


@describes(
    LeverInfo(
        name="optimizer",
        saves="with three steps and sequence warm-up 34 % of FLOPs and 58 % of CPU time against "
        "tuned AdamW on a small language model; nothing at equal quality on digits "
        "(benchmarks/levers)",
        source="Jordan et al., Muon, 2024; Liu et al., Muon is Scalable for LLM Training, 2025",
        applies="hidden matrices, and batches large enough that it adds under 10 % FLOPs",
        hurts="small batches, sharded parameters; fine-tuning of what AdamW trained",
        reversible=False,
        default_on=True,
    )
)
def muon_adamw(
    model: torch.nn.Module,
    lr: float,
    *,
    step_flops: float | None = None,
    max_overhead: float = MAX_OVERHEAD,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    exclude: Iterable[str] = (),
    ns_steps: int = _STEPS,
    enabled: bool = True,
) -> MuonAdamW:
    """Return Muon for the model's hidden matrices with AdamW for the rest, if that pays.

    Weight decay applies to matrices only, as is usual.

    Args:
        model: May be wrapped in DDP.
        lr: Peak rate, for both.
        step_flops: FLOPs of forward and backward of one update
            (`trainonce.levers.flops.count_flops`). Where Muon would add more than
            `max_overhead` of it, AdamW gets everything. None: no gate.
        max_overhead: Limit of that share.
        weight_decay: Decoupled, of matrices.
        betas: Of AdamW.
        exclude: Parts of names that AdamW gets in any case.
        ns_steps: Newton-Schulz steps of Muon. Fewer cost less, which counts where batches are
            small.
        enabled: False gives AdamW everything.

    Returns:
        The optimizer; its `reason` says how it was decided.
    """
    split = split_parameters(model, exclude=exclude)
    hidden = [p for _, p in split.hidden]
    use_muon, reason = enabled and bool(hidden), "on: no gate asked for"
    if not enabled:
        reason = "off: as asked"
    elif not hidden:
        reason = "off: the model has no hidden matrices"
    elif step_flops is not None:
        share = muon_flops(hidden, ns_steps) / step_flops
        use_muon = share < max_overhead
        reason = f"{'on' if use_muon else 'off'}: it adds {share:.1%}, limit {max_overhead:.0%}"
    matrices = [p for _, p in split.rest if p.ndim >= 2]
    vectors = [p for _, p in split.rest if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": hidden, "muon": use_muon, "weight_decay": weight_decay},
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    for group in groups:
        group["ns_steps"] = ns_steps
    optimizer = MuonAdamW([g for g in groups if g["params"]], lr, betas=betas)
    optimizer.reason = reason
    return optimizer


def _check_muon(parameter: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        raise ConfigError(
            "Muon cannot update a sharded parameter: it needs the whole matrix",
            hint="give it to a group without muon=True, or replicate it instead",
        )
    if parameter.ndim < 2:
        raise ConfigError(
            f"Muon cannot update a parameter of shape {list(parameter.shape)}",
            hint="give vectors to a group without muon=True; muon_adamw does that",
        )
