"""`trainonce.plan`: fingerprint, probes, gates, and a plan that says why."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.ledger import prices
from trainonce.levers import gates
from trainonce.levers.batches import as_data, unwrapped
from trainonce.levers.fingerprint import take_fingerprint
from trainonce.levers.gates import MIN_SEQUENCE, shortest_sequence
from trainonce.levers.optimizer import MAX_OVERHEAD, muon_flops, split_parameters
from trainonce.levers.plan_file import Plan, ProbeRecord, RunPlan
from trainonce.levers.precision import Precision
from trainonce.levers.probe import expected_rate
from trainonce.levers.probes import Prober

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainonce.ledger.spending import Budget
    from trainonce.levers.batches import Data
    from trainonce.levers.fingerprint import Fingerprint
    from trainonce.levers.plan_file import LeverPlan

# Share of the run's updates that probes may make, and the fewest that tell anything.
_PROBE_SHARE, _PROBE_LEAST, _PROBE_MOST = 0.2, 10, 200
_RATE_RUNS, _OFF_ARM_SEEDS = 4, 3
_EXPECTED = "to be expected of the model's width, the run's length and the data"
_BATCH_SIZE, _LEAST_UPDATES = 32, 16


def plan(
    model: torch.nn.Module,
    train: Any,
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    task: str | None = None,
    budget: Budget | None = None,
    eval: Any = None,
    steps: int | None = None,
    epochs: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    world_size: int = 1,
    count: Callable[[Any], torch.Tensor] | None = None,
    path: str | Path | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> Plan:
    """Look at a model and its data, try a few things, and say how to train with less compute.

    The probes train the model for a short while, several times, and put it back as it was.
    They run on one process, and communicate with nobody.

    Args:
        model: On the device on which it will be trained.
        train: A map-style dataset, a `DataLoader` of one, or a tuple of tensors. A loader's
            batch size is that of an update, all ranks together.
        loss: `loss(out, batch)` returns one value a sample, shape (B,); a scalar switches the
            per-sample levers off.
        task: "language-model", "vision", "finetune" or "other"; None: found by looking.
        budget: The run is planned no longer than it allows.
        eval: Data of the same kinds to evaluate on.
        steps: Updates of the run.
        epochs: Or passes over the data.
        optimizer: The caller's own; then no rate is probed and Muon is off.
        seed: Of the order of samples.
        world_size: Ranks that will train.
        count: As for `fit`.
        path: Write the plan there as well.
        progress: Told what is being tried.

    Raises:
        ConfigError: Arguments that do not fit one another, a loss of another shape, or a batch
            of which not even one sample fits in memory.
        ProbeError: The loss is not finite.
    """
    data, eval_data = as_data(train), None if eval is None else as_data(eval)
    plain = unwrapped(model)
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    progress("looking at the model and the data")
    fingerprint = take_fingerprint(
        plain, data, loss, task=task, device=device, world_size=world_size, count=count
    )
    batch_size, batch_why = _batch_size(data, world_size)
    length = _length(data, batch_size, fingerprint, steps, epochs)
    prober = Prober(
        plain, data, eval_data, loss,
        device=device, batch_size=batch_size // world_size, seed=seed, count=count,
    )  # fmt: skip
    with contextlib.closing(prober):
        found = _Findings(prober, fingerprint, progress)
        found.measure_step(own_optimizer=optimizer is not None)
        if budget is not None:
            length = _within(budget, length, prober.time_step(), world_size)
        facts = gates.Facts(
            fingerprint=fingerprint,
            epochs=length.steps * batch_size / len(data),
            steps=length.steps,
            rank_batch=prober.batch_size,
            micro_batch=prober.micro_batch,
            micro_reason=found.micro_reason,
            precision=found.precision,
            muon=found.muon,
            lr=None,
            fixed_steps=steps is not None,
            has_eval=eval_data is not None,
            cut_works=found.cut_works,
            recomputes=prober.recomputes,
        )
        length = _pruned(length, gates.decide(facts))
        if optimizer is None:
            found.measure_training(length.steps, length.steps * batch_size / len(data))
        else:
            found.notes.append(
                "no off-arm: the caller's optimizer is not tried out, so the guard only watches "
                "for losses that are not finite"
            )
    made = Plan(
        fingerprint=fingerprint,
        run=RunPlan(
            steps=length.steps,
            batch_size=batch_size,
            micro_batch=prober.micro_batch,
            lr=found.lr[0] if found.lr else 0.0,
            why=f"{length.why}; {batch_why}",
        ),
        levers=gates.decide(dataclasses.replace(facts, steps=length.steps, lr=found.lr)),
        probes=ProbeRecord(
            steps=prober.num_steps,
            share=round(prober.num_steps / length.steps, 4),
            guard_step=found.guard_step,
            off_arm=found.off_arm,
            tried_lr=found.tried_lr,
            notes=found.notes,
        ),
    )
    if path is not None:
        made.write(path)
    return made


class _Findings:
    """What the probes of one plan showed."""

    def __init__(
        self, prober: Prober, fingerprint: Fingerprint, progress: Callable[[str], None]
    ) -> None:
        self._prober = prober
        self._fingerprint = fingerprint
        self._progress = progress
        self.muon: tuple[bool, str] | None = None
        self.lr: tuple[float, str] | None = None
        self.precision = ("", "")
        self.micro_reason = ""
        self.cut_works = ""
        self.guard_step = 0
        self.off_arm: list[float] = []
        self.tried_lr: dict[str, float] = {}
        self.notes: list[str] = []

    def measure_step(self, *, own_optimizer: bool) -> None:
        """Find what fits in memory, what is fast, and whether Muon pays."""
        prober, print_ = self._prober, self._fingerprint
        self._progress("memory: does the batch fit?")
        self.micro_reason = prober.find_micro_batch().reason
        prober.check_finite()
        self._progress("precision: which is fastest here?")
        choice = prober.choose_precision(Precision(device=prober.device))
        self.precision = (choice.mode, choice.reason)
        if print_.task == "language-model" and print_.sequence_length >= MIN_SEQUENCE:
            self.cut_works = prober.cut_works(
                print_.sequence_length, shortest_sequence(print_.sequence_length)
            )
        if not own_optimizer:
            self.muon = _muon(prober, print_)

    def measure_training(self, steps: int, epochs: float) -> None:
        """Probe the rate, and the arm without levers, for a run of `steps`."""
        assert self.muon is not None
        runs = _RATE_RUNS + _OFF_ARM_SEEDS
        each = min(int(_PROBE_SHARE * steps / runs), _PROBE_MOST)
        start = expected_rate(
            self._prober.model, steps, pretrained=self._fingerprint.pretrained,
            samples=self._fingerprint.num_samples, epochs=epochs,
        )  # fmt: skip
        if each < _PROBE_LEAST:
            least = math.ceil(_PROBE_LEAST * runs / _PROBE_SHARE)
            why = f"not probed: {steps} updates are too few, it takes {least}"
            self.lr = (start, f"{_EXPECTED}; {why}")
            self.notes.append(f"no off-arm: {why}")
            return
        self._find_rate(start, each)
        self._find_off_arm(each, steps)

    def _find_rate(self, start: float, each: int) -> None:
        assert self.muon is not None
        self._progress(f"rate: up to {_RATE_RUNS} runs of {each} updates")
        found = self._prober.find_rate(start, self.muon[0], each, _RATE_RUNS)
        why = f"{found.reason}, of {each} updates each"
        if found.value != start:
            # Runs this short prefer rates that are too high for some models and too low for
            # others, also by a clear gain (benchmarks/rates): only a gross error is mended.
            why = f"half-way, in the logarithm, from the {start:g} {_EXPECTED} to what {why}"
        else:
            why = f"{_EXPECTED}; {why}"
        self.lr = (float(f"{math.sqrt(start * found.value):.3g}"), why)
        self.tried_lr = {f"{rate:.4g}": loss for rate, loss in found.tried.items()}

    def _find_off_arm(self, each: int, steps: int) -> None:
        assert self.muon is not None
        assert self.lr is not None
        self._progress(f"off-arm: {_OFF_ARM_SEEDS} runs of {each} updates without the levers")
        self.guard_step = each
        self.off_arm = [
            self._prober.train(self.lr[0], self.muon[0], each, total_steps=steps, seed=seed)
            for seed in range(_OFF_ARM_SEEDS)
        ]


def _muon(prober: Prober, fingerprint: Fingerprint) -> tuple[bool, str]:
    if fingerprint.pretrained:
        return False, "the model was trained before, most likely with AdamW"
    hidden = [p for _, p in split_parameters(prober.model).hidden]
    if not hidden:
        return False, "the model has no hidden matrices"
    step_flops = prober.count_step_flops()
    if not step_flops:
        return False, "no FLOPs were counted in a step, so its overhead is not known"
    share = muon_flops(hidden) / step_flops
    limit = f"it adds {share:.1%} to a step's FLOPs, limit {MAX_OVERHEAD:.0%}"
    return share < MAX_OVERHEAD, limit


@dataclass(frozen=True)
class _Length:
    steps: int
    why: str


def _batch_size(data: Data, world_size: int) -> tuple[int, str]:
    """Return the samples of an update, and why; a multiple of the number of ranks."""
    if data.batch_size is not None:
        wanted, why = data.batch_size, "the batch size is the loader's"
    else:
        wanted = min(_BATCH_SIZE, max(len(data) // _LEAST_UPDATES, 1))
        why = f"nobody gave a batch size: {_BATCH_SIZE}, or what makes {_LEAST_UPDATES} an epoch"
    if len(data) < world_size:
        raise ConfigError(
            f"{len(data)} samples are too few for {world_size} ranks", hint="use fewer ranks"
        )
    size = min(max(wanted // world_size, 1) * world_size, len(data) // world_size * world_size)
    return size, why if size == wanted else f"{why}, {size} to fit data and ranks"


def _length(
    data: Data, batch_size: int, fingerprint: Fingerprint, steps: int | None, epochs: float | None
) -> _Length:
    if steps is not None and epochs is not None:
        raise ConfigError("steps and epochs were both given", hint="give one of them")
    if isinstance(steps, str) or isinstance(epochs, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"{steps=} and {epochs=} are no numbers", hint="steps=100, not '100'")
    why = "the length is the caller's"
    if steps is None and epochs is None:
        epochs = 1 if fingerprint.task == "language-model" else 3 if fingerprint.pretrained else 10
        why = f"nobody gave a length: {epochs} passes over the data"
    if epochs is not None and not math.isfinite(epochs):
        raise ConfigError(f"{epochs=} is no length", hint="a number of passes over the data")
    if steps is None:
        assert epochs is not None
        steps = max(round(epochs * len(data) / batch_size), 1) if epochs > 0 else 0
    if steps < 1:
        raise ConfigError(f"{steps=} and {epochs=} leave nothing to do", hint="at least one update")
    return _Length(steps, why)


def _within(budget: Budget | None, length: _Length, step_s: float, world_size: int) -> _Length:
    """Cut the run to what the budget allows, at the step time that the probes measured."""
    if budget is None or not step_s:
        return length
    hours = [budget.max_hours] if budget.max_hours is not None else []
    price = prices.load(settings.home()).prices.usd_per_gpu_hour
    if budget.max_cost_usd is not None and price:
        hours.append(budget.max_cost_usd / (price * world_size))
    if not hours:
        return length
    most = int(0.9 * min(hours) * 3600 / step_s)  # a tenth for evaluations and the rest
    if most >= length.steps:
        return length
    if most < 1:
        raise ConfigError(
            f"the budget allows {min(hours):.3g} hours, and one update takes {step_s:.3g} s",
            hint="raise the budget",
        )
    return _Length(most, f"cut from {length.steps} updates to what the budget allows")


def _pruned(length: _Length, levers: dict[str, LeverPlan]) -> _Length:
    """Leave out the updates that InfoBatch saves, where it is on."""
    if not levers["infobatch"].on:
        return length
    share = gates.infobatch_share(levers["infobatch"].settings)
    why = f"{length.why}, and InfoBatch needs about {share:.0%} of {length.steps} updates"
    return _Length(max(round(share * length.steps), 1), why)
