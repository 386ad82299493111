"""The training that `fit` does: a model, the levers of a plan, and what one update is."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from trainonce.errors import ConfigError
from trainonce.levers.base import Stack
from trainonce.levers.batches import call_model, num_samples, to_device
from trainonce.levers.building import build_levers, build_optimizer, quantize, recompute_blocks
from trainonce.levers.fingerprint import amount_of, is_per_sample
from trainonce.levers.infobatch import WithIndex
from trainonce.levers.memory import Accumulation
from trainonce.levers.noise_scale import NoiseScale
from trainonce.levers.precision import Precision
from trainonce.worker.seeds import derive_seed, seed_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trainonce.levers.batches import Count, Data, Loss
    from trainonce.levers.host import Host
    from trainonce.levers.plan_file import Plan


@dataclass
class State:
    """What must survive beside model, optimizer and levers; equal on all ranks.

    Attributes:
        updates: Loader batches trained on so far: one an update, but for the noise scale.
        before: The same before the last update.
        best: Best value on the evaluation data, and `best_step`, after how many updates.
        history: [updates, training loss, value or NaN] of each look.
        stop: Why the run ended early; "" if it did not.
        stop_is_budget: It may go on with a larger budget.
        guard: What the guard said last; `guard_fired`: it has switched levers off.
        spent: Used so far, by kind.
    """

    updates: int = 0
    before: int = 0
    best: float = math.inf
    best_step: int = 0
    history: list[list[float]] = field(default_factory=lambda: [])
    stop: str = ""
    stop_is_budget: bool = False
    guard: str = ""
    guard_fired: bool = False
    spent: dict[str, float] = field(default_factory=lambda: {})

    def state_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        vars(self).update(state)


class Training:
    """The model, its levers, and what an update does. What happens between them is `Watch`'s.

    Args:
        host: Where it runs.
        plan: What is on.
        model: Of the caller, on the host's device.
        data: To train on.
        loss: Of the caller.
        optimizer: Of the caller; the plan's if None.
        count: Of the caller: how much of each sample counts; its samples if None.
        seed: Of order and generators.

    Attributes:
        went_on: Called before an update whose state was loaded from elsewhere.

    Raises:
        ConfigError: Levers of the plan that do not fit one another, the ranks or a `count`.
    """

    def __init__(
        self, host: Host, plan: Plan, model: torch.nn.Module, data: Data, loss: Loss,
        optimizer: torch.optim.Optimizer | None, *, count: Count | None, seed: int,
    ) -> None:  # fmt: skip
        self.host, self.plan, self.state = host, plan, State()
        quantize(plan, model)
        self.optimizer = optimizer or build_optimizer(plan, model)
        self.levers = build_levers(plan, model, self.optimizer, data, device=host.device, seed=seed)
        self._check_levers(count)
        self.stack = Stack(**self.levers)
        self.loader = self._make_loader(data)
        self._recomputing = recompute_blocks(plan, model, data, loss, host.device)
        self.model = model
        if host.world_size > 1 and not isinstance(model, DistributedDataParallel):
            unused = plan.is_on("freeze")
            self.model = DistributedDataParallel(model, find_unused_parameters=unused)
        self.went_on: Callable[[], None] = lambda: None
        self._loss, self._count, self._seed = loss, count, seed
        self._last_step = 0
        self._joined = 0  # batches whose gradients wait for their update
        self.model.train()

    def _check_levers(self, count: Count | None) -> None:
        if {"infobatch", "noise-scale"} <= self.levers.keys() and self.host.world_size > 1:
            raise ConfigError(
                "InfoBatch gathers scores in each batch, and the noise scale joins batches that "
                "must not communicate",
                hint="switch one of them off in the plan, or train on one rank",
            )
        if count is not None and "noise-scale" in self.levers:
            raise ConfigError(
                "the noise scale joins batches to one update before it is known what counts in all",
                hint="switch the noise scale off in the plan, or give no count",
            )

    def _make_loader(self, data: Data) -> Any:
        sampler = self.levers.get("infobatch")
        order = {"shuffle": True} if sampler is None else {"sampler": sampler}
        return self.host.dataloader(
            WithIndex(data.dataset),
            max(self.plan.run.batch_size // self.host.world_size, 1),
            collate_fn=data.collate_indexed,
            drop_last=True,
            num_workers=data.num_workers,
            **order,
        )

    def flags(self) -> contextlib.AbstractContextManager[None]:
        """Return the context that holds the process-wide flags of the precision."""
        precision = self.levers["precision"]
        assert isinstance(precision, Precision)
        return precision.flags()

    def update(self, indexed: tuple[torch.Tensor, Any]) -> torch.Tensor:
        """Train on one batch, and return the mean loss of this rank's samples, shape ().

        It is an update, unless the noise scale wants more batches in one: then gradients stay
        here until the last of them.
        """
        indices, batch = indexed
        first = self.state.updates
        if first != self._last_step:  # the state was loaded from elsewhere
            self.went_on()
            self._last_step = first
        if self._joined and all(p.grad is None for p in self.model.parameters()):
            self._joined = 0  # what waited is gone: a rehearsal, or a state from elsewhere
        step = first + self._joined
        # By the step alone: what looks at the run in between must not change what it draws.
        seed_generators(derive_seed("update", self._seed, self.host.rank, step))
        if not self._joined:
            self.stack.begin_step(first)
        wanted = min(self._num_batches(), self.plan.run.steps - first)
        self._joined += 1
        is_last = self._joined == wanted
        no_sync = getattr(self.model, "no_sync", None)
        with contextlib.nullcontext() if is_last or no_sync is None else no_sync():
            total = self._backward(indices, batch, 1 / wanted)
        if is_last:
            self.stack.update(self.optimizer)
            self.stack.end_step(step)
            self.optimizer.zero_grad(set_to_none=True)
            self.state.before, self.state.updates = first, first + wanted
            self._last_step, self._joined = self.state.updates, 0
        return total

    def _num_batches(self) -> int:
        lever = self.levers.get("noise-scale")
        return lever.num_batches if isinstance(lever, NoiseScale) and lever.enabled else 1

    def _backward(self, indices: torch.Tensor, batch: Any, weight: float) -> torch.Tensor:
        """Add the gradients of a batch, times `weight`, to those there are; return its loss."""
        before = num_samples(batch)
        batch = self.stack.shape_batch(to_device(batch, self.host.device))
        samples = num_samples(batch)
        # Sequences that were cut count as parts of a sample: as many tokens fit at once.
        accumulation = Accumulation(max(self.plan.run.micro_batch * samples // before, 1))
        amount = amount_of(batch, self._count)
        # Every rank has as many samples: what does not fill a step is left out.
        scale = weight / samples
        if self._count is not None:
            scale = weight * accumulation.scale(amount, self.host.device)
        local = self.host.local
        total = torch.zeros((), dtype=torch.float64, device=self.host.device)
        for (part, micro), sync in accumulation.split(
            (indices if samples == before else torch.arange(samples), batch), self.model
        ):
            with sync:
                with self.stack.autocast():
                    losses = self._loss(call_model(self.model, micro), micro).float()
                count = num_samples(micro)
                mean = self._reduce(losses, part, count)
                share, weighs = losses.detach().double().mean() * (count / samples), count / samples
                if self._count is not None:
                    share, weighs = losses.detach().double().sum(), amount_of(micro, self._count)
                total += share
                # Before the backward pass: the last collective is in there, and what differs by
                # rank must be known by then, or it is lost with a process that dies right after.
                local["loss_sum"] = share + local.get("loss_sum", 0.0)
                local["loss_count"] = local.get("loss_count", 0.0) + weighs
                self.stack.scale_loss(mean * (count * scale)).backward()
        return total if self._count is None else total / max(amount, 1)

    def _reduce(self, losses: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
        if is_per_sample(losses, count):
            return self.stack.reduce_loss(losses, indices)
        if self._count is not None:
            raise ConfigError(
                "the loss is a scalar, and a count was given",
                hint="return the sum over what counts of each sample, shape (B,)",
            )
        if "infobatch" in self.levers and self.levers["infobatch"].enabled:
            raise ConfigError(
                "the loss is a scalar, and InfoBatch is on in the plan",
                hint="return one value a sample, or switch [levers.infobatch] off",
            )
        return losses

    @property
    def mid_update(self) -> bool:
        """Whether gradients of earlier batches wait for their update."""
        return self._joined > 0

    def close(self) -> None:
        """Put the model's blocks back as they were."""
        if self._recomputing is not None:
            self._recomputing.remove()
