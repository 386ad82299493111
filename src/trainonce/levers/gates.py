"""Which levers a plan switches on: pure decisions, from the fingerprint and the probes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.levers import registry
from trainonce.levers.plan_file import LeverPlan

if TYPE_CHECKING:
    from trainonce.levers.fingerprint import Fingerprint

MIN_INFOBATCH_EPOCHS = 8
MIN_SEQUENCE = 32


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the gates decide from.

    Args:
        fingerprint: Of model and data.
        epochs: Passes over the data that the run makes.
        steps: Updates of the run.
        rank_batch: Samples of an update that one rank takes.
        micro_batch: Samples that fit at once; below `rank_batch`, gradients are accumulated.
        micro_reason: What limited it.
        precision: Mode, and the measurement behind it.
        muon: Whether Muon is worth it, and why; None where the optimizer is the caller's.
        lr: Peak rate and why; None where the optimizer is the caller's.
        fixed_steps: The caller gave the number of updates, and not of epochs.
        has_eval: There are data to evaluate on.
        cut_works: The model and the loss accept shorter sequences, or why not.
        recomputes: Not even one sample fits with its activations kept.
    """

    fingerprint: Fingerprint
    epochs: float
    steps: int
    rank_batch: int
    micro_batch: int
    micro_reason: str
    precision: tuple[str, str]
    muon: tuple[bool, str] | None
    lr: tuple[float, str] | None
    fixed_steps: bool
    has_eval: bool
    cut_works: str
    recomputes: bool


def decide(facts: Facts) -> dict[str, LeverPlan]:
    """Return every lever of the registry, on or off, with its reason."""
    decisions = {
        "smoke": _smoke(facts),
        "batch-size": _batch_size(facts),
        "rate-probe": _rate(facts),
        "horizon": (False, "one run: the ladder of lengths would cost more than it saves", {}),
        "recompute": _recompute(facts),
        "precision": _precision(facts),
        "optimizer": _optimizer(facts),
        "schedule": (True, f"the length is known: {facts.steps} updates", {"warmup": 0.1}),
        "sequence-warmup": _sequence(facts),
        "infobatch": _infobatch(facts),
        "freeze": _freeze(facts),
        "early-stop": _early_stop(facts),
    }
    plans: dict[str, LeverPlan] = {}
    for name in registry.LEVERS:
        info = registry.load(name).info
        on, why, settings = decisions.get(name) or _asked_for(name)
        plans[name] = LeverPlan(
            on=on,
            why=why,
            expected=f"{info.saves} (source: {info.source})",
            reversible=info.reversible,
            settings=settings,
        )
    return plans


def shortest_sequence(length: int) -> int:
    """Return the first length of a sequence warm-up to `length`."""
    return max(16, length // 8)


def infobatch_share(settings: dict[str, Any]) -> float:
    """Return the share of updates that InfoBatch is expected to leave of a run.

    About 0.65 of the samples are easier than the mean, as losses are skewed; the first epoch
    and those after `anneal` are not pruned.
    """
    pruned = max(settings["anneal"] - 1 / settings["num_epochs"], 0.0)
    return 1 - 0.65 * settings["ratio"] * pruned


Decision = tuple[bool, str, dict[str, Any]]


def _smoke(_facts: Facts) -> Decision:
    return False, "it comes before the run: `trainonce run --smoke`, or smoke_test(script)", {}


def _batch_size(facts: Facts) -> Decision:
    settings = {"micro_batch": facts.micro_batch}
    if facts.micro_batch < facts.rank_batch:
        return True, f"accumulates gradients, as {facts.micro_reason}", settings
    return True, f"the whole batch fits: {facts.micro_reason}", settings


def _recompute(facts: Facts) -> Decision:
    if facts.recomputes:
        return True, "not even one sample fits with its activations kept", {}
    if facts.micro_batch < facts.rank_batch:
        return False, "the batch fits in parts, and accumulation computes nothing twice", {}
    return False, "it saves memory, not FLOPs, and the batch fits", {}


def _rate(facts: Facts) -> Decision:
    if facts.lr is None:
        return False, "the optimizer is the caller's, and so is its rate", {}
    rate, why = facts.lr
    return True, why, {"lr": rate}


def _precision(facts: Facts) -> Decision:
    mode, why = facts.precision
    return True, why, {"mode": mode}


def _optimizer(facts: Facts) -> Decision:
    if facts.muon is None:
        return False, "the optimizer is the caller's", {}
    on, why = facts.muon
    return on, why, {"weight_decay": 0.1 if on else 0.01}


def _sequence(facts: Facts) -> Decision:
    print_ = facts.fingerprint
    if print_.task != "language-model":
        return False, "it is for causal language models, and this is none", {}
    if print_.learned_positions:
        return False, "the model learns its positions, and would see the late ones less often", {}
    if print_.sequence_length < MIN_SEQUENCE:
        return False, f"sequences of {print_.sequence_length} tokens are short already", {}
    if facts.cut_works:
        return False, facts.cut_works, {}
    settings = {"ramp": 0.3, "shortest": shortest_sequence(print_.sequence_length)}
    return True, "a causal language model that accepts shorter sequences", settings


def _infobatch(facts: Facts) -> Decision:
    settings = {"num_epochs": math.ceil(facts.epochs), "ratio": 0.5, "anneal": 0.875}
    if not facts.fingerprint.per_sample:
        return False, "the loss is a scalar, and it needs one value a sample", settings
    if facts.fingerprint.task == "language-model":
        return False, "samples of a language model are seen too few times to be left out", settings
    if facts.fixed_steps:
        why = "the number of updates is given: what it leaves out would only be made good"
        return False, why, settings
    if facts.epochs < MIN_INFOBATCH_EPOCHS:
        why = f"{facts.epochs:.3g} epochs; it pays from {MIN_INFOBATCH_EPOCHS}"
        return False, why, settings
    if facts.muon is not None and facts.muon[0]:
        return False, "Muon is on, and it was measured to gain nothing on top of it", settings
    if facts.fingerprint.num_samples < 4 * facts.rank_batch * facts.fingerprint.world_size:
        return False, "a pruned epoch would be too short for the batch size", settings
    if facts.micro_batch < facts.rank_batch and facts.fingerprint.world_size > 1:
        return False, "gradients are accumulated, and ranks would gather scores apart", settings
    return True, f"{facts.epochs:.3g} epochs, and a loss for each sample", settings


def _freeze(facts: Facts) -> Decision:
    settings = {"window": max(facts.steps // 20, 1), "threshold": 0.5, "patience": 1}
    if not facts.fingerprint.pretrained:
        return False, "the model starts from scratch, where freezing costs quality", settings
    if facts.fingerprint.world_size > 1:
        return False, "several ranks: DDP would have to be built anew as layers freeze", settings
    return True, "the model was trained before", settings


def _early_stop(facts: Facts) -> Decision:
    why = "the schedule ends at zero: a shorter one is better than to stop before its end"
    if not facts.has_eval:
        why = "there are no data to evaluate on"
    return False, why, {"patience": 5, "min_delta": 0.0}


def _asked_for(name: str) -> Decision:
    return False, f"{_ONLY_ASKED_FOR.get(name, 'nobody asked for it')}; only where asked for", {}


_ONLY_ASKED_FOR = {
    "quantized": "it changes the numbers, and needs torchao and hardware for it",
    "noise-scale": "it saves updates, not FLOPs: for more devices than the batch keeps busy",
}
