"""What the probes of one plan show: of a step, of the rate, and of training without levers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trainonce.levers.gates import MIN_SEQUENCE, Facts, shortest_sequence
from trainonce.levers.optimizer import MAX_OVERHEAD, muon_flops, split_parameters
from trainonce.levers.plan_file import ProbeRecord
from trainonce.levers.precision import Precision
from trainonce.levers.probe import expected_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.levers.fingerprint import Fingerprint
    from trainonce.levers.probes import Prober

# Share of the run's updates that probes may make, and the fewest that tell anything.
_PROBE_SHARE, _PROBE_LEAST, _PROBE_MOST = 0.2, 10, 200
_RATE_RUNS, _OFF_ARM_SEEDS = 4, 3
_EXPECTED = "to be expected of the model's width, the run's length and the data"


class Findings:
    """What the probes of one plan showed.

    Args:
        prober: Tries things out.
        fingerprint: Of model and data.
        progress: Told what is being tried.
        own_optimizer: The caller gave an optimizer, which is not tried out.

    Attributes:
        lr: Peak rate and why; None until it is known, and where the optimizer is the caller's.
    """

    def __init__(
        self, prober: Prober, fingerprint: Fingerprint, progress: Callable[[str], None],
        *, own_optimizer: bool,
    ) -> None:  # fmt: skip
        self._prober = prober
        self._fingerprint = fingerprint
        self._progress = progress
        self._own_optimizer = own_optimizer
        self._muon: tuple[bool, str] | None = None
        self.lr: tuple[float, str] | None = None
        self._precision = ("", "")
        self._micro_reason = ""
        self._cut_works = ""
        self._guard_step = 0
        self._off_arm: list[float] = []
        self._tried_lr: dict[str, float] = {}
        self._notes: list[str] = []

    def measure_step(self) -> None:
        """Find what fits in memory, what is fast, and whether Muon pays."""
        prober, print_ = self._prober, self._fingerprint
        self._progress("memory: does the batch fit?")
        self._micro_reason = prober.find_micro_batch().reason
        prober.check_finite()
        self._progress("precision: which is fastest here?")
        choice = prober.choose_precision(Precision(device=prober.device))
        self._precision = (choice.mode, choice.reason)
        if print_.task == "language-model" and print_.sequence_length >= MIN_SEQUENCE:
            self._cut_works = prober.cut_works(
                print_.sequence_length, shortest_sequence(print_.sequence_length)
            )
        if not self._own_optimizer:
            self._muon = _muon(prober, print_)

    def measure_training(self, steps: int, epochs: float) -> None:
        """Probe the rate, and the arm without levers, for a run of `steps`."""
        if self._muon is None:
            self._notes.append(
                "no off-arm: the caller's optimizer is not tried out, so the guard only watches "
                "for losses that are not finite"
            )
            return
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
            self._notes.append(f"no off-arm: {why}")
            return
        muon, _ = self._muon
        rate = self._find_rate(start, muon, each)
        self._progress(f"off-arm: {_OFF_ARM_SEEDS} runs of {each} updates without the levers")
        self._guard_step = each
        self._off_arm = [
            self._prober.train(rate, muon, each, total_steps=steps, seed=seed)
            for seed in range(_OFF_ARM_SEEDS)
        ]

    def _find_rate(self, start: float, muon: bool, each: int) -> float:
        self._progress(f"rate: up to {_RATE_RUNS} runs of {each} updates")
        found = self._prober.find_rate(start, muon, each, _RATE_RUNS)
        why = f"{found.reason}, of {each} updates each"
        if found.value != start:
            # Runs this short prefer rates that are too high for some models and too low for
            # others, also by a clear gain (benchmarks/rates): only a gross error is mended.
            why = f"half-way, in the logarithm, from the {start:g} {_EXPECTED} to what {why}"
        else:
            why = f"{_EXPECTED}; {why}"
        rate = float(f"{math.sqrt(start * found.value):.3g}")
        self.lr = (rate, why)
        self._tried_lr = {f"{tried:.4g}": loss for tried, loss in found.tried.items()}
        return rate

    def facts(self, steps: int, *, epochs: float, fixed_steps: bool, has_eval: bool) -> Facts:
        """Return what the gates decide from, before training was probed."""
        prober = self._prober
        return Facts(
            fingerprint=self._fingerprint,
            epochs=epochs,
            steps=steps,
            rank_batch=prober.batch_size,
            micro_batch=prober.micro_batch,
            micro_reason=self._micro_reason,
            precision=self._precision,
            muon=self._muon,
            lr=None,
            fixed_steps=fixed_steps,
            has_eval=has_eval,
            cut_works=self._cut_works,
            recomputes=prober.recomputes,
        )

    def record(self, steps: int) -> ProbeRecord:
        """Return what the plan of a run of `steps` keeps."""
        return ProbeRecord(
            steps=self._prober.num_steps,
            share=round(self._prober.num_steps / steps, 4),
            guard_step=self._guard_step,
            off_arm=self._off_arm,
            tried_lr=self._tried_lr,
            notes=self._notes,
        )


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
