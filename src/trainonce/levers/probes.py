"""Short training runs before the run, each of which leaves the model as it was."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import ConfigError, ProbeError
from trainonce.levers.batches import blocks_of, call_model, num_samples, to_device
from trainonce.levers.fingerprint import amount_of, is_per_sample, kept
from trainonce.levers.flops import count_flops
from trainonce.levers.memory import Accumulation, BatchSize, find_batch_size
from trainonce.levers.optimizer import muon_adamw
from trainonce.levers.precision import Precision, PrecisionChoice
from trainonce.levers.probe import Choice, rate_probe
from trainonce.levers.recompute import Recomputing, recompute_all
from trainonce.levers.schedule import Schedule
from trainonce.levers.sequence import SequenceWarmup
from trainonce.worker.seeds import derive_seed, seed_generators

if TYPE_CHECKING:
    from trainonce.levers.batches import Count, Data, Loss

_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 256
_LEAST_GAIN = 0.5


class Prober:
    """Trains a little, and puts model and generators back.

    Args:
        model: Not wrapped in DDP: probes are one rank's affair.
        data: To train on. A tenth of it, at most 256 samples, is held out of the probes.
        eval_data: Held out instead, where there are any.
        loss: Of the caller.
        device: Where the model is.
        batch_size: Samples of an update that one rank takes.
        seed: Of the order.
        count: How much of each sample counts; the loss is a sum then.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: Data,
        eval_data: Data | None,
        loss: Loss,
        *,
        device: torch.device,
        batch_size: int,
        seed: int,
        count: Count | None = None,
    ) -> None:
        self.model = model
        self._data = data
        self._loss = loss
        self._count = count
        self.device = device
        self._seed = seed
        self.batch_size = batch_size
        self.micro_batch = batch_size
        self.precision = Precision("tf32", device=device)
        self._recomputing: Recomputing | None = None
        self.num_steps = 0
        self.step_s = 0.0
        self._held_out = eval_data or data
        held_out = guard_indices(len(data), len(eval_data) if eval_data else None, seed)
        self._held_out_indices = held_out
        left = set[int]() if eval_data else set(held_out)
        # A dataset of one sample is both.
        self._train_indices = [i for i in range(len(data)) if i not in left] or held_out

    # ------------------------------------------------------------------ what is measured

    def check_finite(self) -> None:
        """Raise unless the untrained model has a finite loss, on samples of both kinds.

        Raises:
            ProbeError: It is NaN or infinite.
        """
        with kept(self.model), torch.no_grad():
            found = self.held_out_loss()
            if math.isfinite(found):
                self.model.train()
                batch = self._batch(self._train_indices[: self.micro_batch])
                found = float(self._mean_loss(batch))
        if not math.isfinite(found):
            raise ProbeError(
                f"the loss is {found:g} before any training",
                hint="look for NaN in the data, and for a log or division in the loss",
            )

    def count_step_flops(self) -> int:
        """Return the FLOPs of forward and backward of one rank's batch."""
        batch = self._batch(self._train_indices[: self.micro_batch])
        with kept(self.model):
            _, flops = count_flops(lambda: self._mean_loss(batch).backward())
        return round(flops * self.batch_size / max(num_samples(batch), 1))

    def find_micro_batch(self) -> BatchSize:
        """Find how many samples fit at once, up to the batch of one rank.

        Where not even one does, activations are recomputed from here on, until `close`.

        Raises:
            ConfigError: Not even one does then.
        """
        try:
            found = self._largest()
        except ConfigError:
            blocks = blocks_of(self.model)
            if not blocks:
                raise
            self._recomputing = recompute_all(blocks)
            found = self._largest()
        self.micro_batch = found.micro_batch
        return found

    @property
    def recomputes(self) -> bool:
        """Whether not even one sample fits with its activations kept."""
        return self._recomputing is not None

    def close(self) -> None:
        """Put the model's blocks back as they were."""
        if self._recomputing is not None:
            self._recomputing.remove()

    def _largest(self) -> BatchSize:

        def trial(size: int) -> None:
            indices = (self._train_indices * (size // len(self._train_indices) + 1))[:size]
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
            self._mean_loss(self._batch(indices)).backward()
            optimizer.step()

        with kept(self.model):
            return find_batch_size(
                trial,
                maximum=self.batch_size,
                start=self.batch_size,
                keep=[self.model],
                device=self.device,
                agree=False,
            )

    def choose_precision(self, wanted: Precision) -> PrecisionChoice:
        """Time the step in each mode, if `wanted` is undecided; use the result from here on."""
        batch = self._batch(self._train_indices[: self.micro_batch])
        with kept(self.model):
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

            def step(precision: Precision) -> torch.Tensor:
                loss = self._mean_loss(batch, precision)
                precision.scale_loss(loss).backward()
                if bool(torch.isfinite(loss.detach())):  # else it would spoil the other modes
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return loss

            choice = wanted.choose(step)
        self.num_steps += 6 * len(choice.step_s)
        self.precision = wanted
        return choice

    def time_step(self) -> float:
        """Return the median seconds of three updates."""
        self.train(0.0, False, 3, total_steps=3, seed=self._seed)
        return self.step_s

    def find_rate(self, start: float, muon: bool, steps: int, max_runs: int) -> Choice:
        """Walk over rates by runs of so many steps, each with a finished schedule.

        Runs this short show noise as well, so `start` is left only for a clear gain.

        Raises:
            ProbeError: The loss was not finite at any rate.
        """
        try:
            return rate_probe(
                lambda rate: self.train(rate, muon, steps, total_steps=steps, seed=self._seed),
                start,
                factor=2.5,
                max_runs=max_runs,
                least_gain=_LEAST_GAIN,
            )
        except ConfigError as error:
            raise ProbeError(error.message, hint=error.hint) from error

    def cut_works(self, length: int, shortest: int) -> str:
        """Return "" if model and loss take sequences cut by the warm-up, else why not."""
        warmup = SequenceWarmup(length, 100, shortest=shortest)
        warmup.begin_step(0)
        batch = self._batch(self._train_indices[: self.micro_batch])
        try:
            with kept(self.model), torch.no_grad():
                found = self._mean_loss(warmup.shape_batch(batch))
        except (RuntimeError, ValueError, IndexError) as error:
            return f"model or loss do not take shorter sequences: {str(error).splitlines()[0]}"
        return "" if bool(torch.isfinite(found)) else "the loss of shorter sequences is not finite"

    def train(self, lr: float, muon: bool, steps: int, *, total_steps: int, seed: int) -> float:
        """Train for the first `steps` of a run of `total_steps`; return the held-out loss.

        Every reversible lever is off, but for what fits in memory.
        """
        generator = torch.Generator().manual_seed(derive_seed("probe", seed))
        with kept(self.model):
            self.model.train()
            seed_generators(derive_seed("probe-model", seed))
            optimizer = muon_adamw(self.model, lr, enabled=muon, weight_decay=0.1 if muon else 0.01)
            schedule = Schedule(optimizer, total_steps)
            times: list[float] = []
            chosen: list[int] = []
            for step in range(steps):
                while len(chosen) < self.batch_size:
                    order = torch.randperm(len(self._train_indices), generator=generator)
                    chosen += [self._train_indices[index] for index in order.tolist()]
                batch = self._batch(chosen[: self.batch_size])
                chosen = chosen[self.batch_size :]
                begun_s = time.perf_counter()
                schedule.begin_step(step)
                loss = self._backward(batch)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                times.append(time.perf_counter() - begun_s)
                if not math.isfinite(loss):
                    break
            self.num_steps += len(times)
            self.step_s = statistics.median(times)
            return self.held_out_loss()

    # ------------------------------------------------------------------ parts

    def held_out_loss(self) -> float:
        """Return the mean loss of the held-out samples under the model as it is."""
        self.model.eval()
        total, amount = sum_losses(
            self.model, self._held_out, self._held_out_indices, self._loss, self.device,
            self.micro_batch, self._count,
        )  # fmt: skip
        return total / max(amount, 1)

    def _backward(self, batch: Any) -> float:
        total, amount = 0.0, max(amount_of(batch, self._count), 1)
        for micro, _ in Accumulation(self.micro_batch).split(batch):
            loss = self._mean_loss(micro) * (amount_of(micro, self._count) / amount)
            loss.backward()
            total += float(loss.detach())
        return total

    def _mean_loss(self, batch: Any, precision: Precision | None = None) -> torch.Tensor:
        with (precision or self.precision).autocast():
            out = call_model(self.model, batch)
            losses = self._loss(out, batch).float()
            loss = losses.mean()
            if self._count is not None:
                loss = losses.sum() / max(amount_of(batch, self._count), 1)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ConfigError(
                "the loss does not depend on what is trained",
                hint="loss(out, batch) must be computed from out, without detach() or no_grad()",
            )
        return loss

    def _batch(self, indices: list[int]) -> Any:
        return to_device(self._data.batch(indices), self.device)


def guard_indices(num_train: int, num_eval: int | None, seed: int) -> list[int]:
    """Return which samples the guard compares on: of the evaluation data where there are any."""
    total = num_train if num_eval is None else num_eval
    most = max(round(_HELD_OUT_SHARE * total), 1) if num_eval is None else total
    generator = torch.Generator().manual_seed(derive_seed("guard", seed))
    order = torch.randperm(total, generator=generator)
    return sorted(order[: min(most, _HELD_OUT_MOST)].tolist())


@torch.no_grad()
def sum_losses(
    model: torch.nn.Module,
    data: Data,
    indices: list[int],
    loss: Loss,
    device: torch.device,
    batch_size: int,
    count: Count | None = None,
) -> tuple[float, int]:
    """Return the sum of a loss or metric, and over how many samples, or of what `count` counts.

    The model is in the mode it is in.
    """
    total, amount = 0.0, 0
    for start in range(0, len(indices), batch_size):
        batch = to_device(data.batch(indices[start : start + batch_size]), device)
        samples = num_samples(batch)
        values = loss(call_model(model, batch), batch)
        found: Any = values
        is_per_sample(found.float() if isinstance(found, torch.Tensor) else found, samples)
        mean = count is None
        total += float(values.double().mean()) * samples if mean else float(values.double().sum())
        amount += amount_of(batch, count)
    return total, amount
