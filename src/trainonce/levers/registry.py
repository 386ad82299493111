"""All levers, one line each, in the order in which they act within a step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from trainonce.levers.base import LeverInfo

# Name -> "module:object". The object is a class or a function with an `info` attribute.
LEVERS: dict[str, str] = {
    "smoke": "trainonce.levers.smoke:smoke_test",
    "batch-size": "trainonce.levers.memory:find_batch_size",
    "rate-probe": "trainonce.levers.probe:rate_probe",
    "horizon": "trainonce.levers.probe:horizon_ladder",
    "recompute": "trainonce.levers.recompute:recompute",
    "precision": "trainonce.levers.precision:Precision",
    "quantized": "trainonce.levers.quantized:quantized_training",
    "optimizer": "trainonce.levers.optimizer:muon_adamw",
    "schedule": "trainonce.levers.schedule:Schedule",
    "noise-scale": "trainonce.levers.noise_scale:NoiseScale",
    "sequence-warmup": "trainonce.levers.sequence:SequenceWarmup",
    "infobatch": "trainonce.levers.infobatch:InfoBatch",
    "freeze": "trainonce.levers.freeze:Freeze",
    "early-stop": "trainonce.levers.early_stop:EarlyStop",
}


def load(name: str) -> Any:
    """Return the lever of that name: a class, or a function for those that act once.

    Raises:
        ConfigError: There is none.
    """
    if name not in LEVERS:
        raise ConfigError(f"there is no lever {name!r}", hint="one of " + ", ".join(LEVERS))
    module, _, attribute = LEVERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def describe() -> list[LeverInfo]:
    """Return what is known about every lever, in the registry's order."""
    return [load(name).info for name in LEVERS]
