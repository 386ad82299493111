"""Matrix products in float8 or int8 while training, by torchao, where it and the hardware are."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from trainonce.errors import ConfigError
from trainonce.levers.base import LeverInfo, describes

# Least compute capability of a CUDA device with units for the dtype.
_CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}
_MULTIPLE = 16


@describes(
    LeverInfo(
        name="quantized",
        saves="10-25 % of step time, up to a third, published for float8; not measured here",
        source="torchao, float8 training; Micikevicius et al., FP8 Formats for Deep Learning, 2022",
        applies="large linear layers on H100 and newer (fp8) or A100 and newer (int8), compiled",
        hurts="everything else: conversions cost more than is gained, and numbers are coarser",
        reversible=False,
        default_on=False,
    )
)
def quantized_training(
    model: torch.nn.Module, dtype: str = "fp8", *, emulate: bool = False, enabled: bool = True
) -> torch.nn.Module:
    """Have a model's linear layers multiply in float8 or int8; weights stay as they are.

    Layers whose sizes are no multiple of 16 stay as they are too: matrix units do not take them.
    Call it before DDP and before `torch.compile`, without which it does not pay.

    Args:
        model: Changed in place.
        dtype: "fp8" or "int8".
        emulate: Go without units for the dtype, on any device: slower than float32, to see what
            the coarser numbers do to a model's quality.
        enabled: False changes nothing.

    Returns:
        The model.

    Raises:
        ConfigError: There is no such dtype, torchao is not installed, the device has no units
            for it, or the model has no layer for it.
    """
    if not enabled:
        return model
    if dtype not in _CAPABILITY:
        raise ConfigError(f"there is no quantized training in {dtype!r}", hint="fp8 or int8")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if why := why_not(dtype, device, emulate=emulate):
        raise ConfigError(f"{dtype} training is not possible here: {why}", hint="take bf16")
    if isinstance(model, torch.nn.Linear):
        raise ConfigError(
            "a model that is one linear layer cannot be changed in place",
            hint="put it into a torch.nn.Sequential",
        )
    if not any(_fits(module) for module in model.modules()):
        raise ConfigError(
            f"no linear layer of the model can multiply in {dtype}",
            hint=f"their sizes must be multiples of {_MULTIPLE}",
        )
    if dtype == "fp8":
        float8: Any = importlib.import_module("torchao.float8")
        return float8.convert_to_float8_training(
            model, config=float8.Float8LinearConfig(emulate=emulate), module_filter_fn=_fits
        )
    quantization: Any = importlib.import_module("torchao.quantization")
    training: Any = importlib.import_module("torchao.prototype.quantized_training")
    # Layers are swapped, and not their weights: those stay plain tensors, to save and to protect.
    config = training.int8_mixed_precision_training(module_swap=True)
    quantization.quantize_(model, config, filter_fn=_fits)
    return model


def _fits(module: torch.nn.Module, _name: str = "") -> bool:
    if not isinstance(module, torch.nn.Linear):
        return False
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0


def why_not(dtype: str, device: torch.device, *, emulate: bool = False) -> str:
    """Return why a device cannot train in a dtype, or "" where it can."""
    if not emulate:
        if device.type != "cuda":
            return f"the model is on {device.type}, and it takes a CUDA device, or emulate=True"
        found, least = torch.cuda.get_device_capability(device), _CAPABILITY[dtype]
        if found < least:
            return f"compute capability {found[0]}.{found[1]}, and it takes {least[0]}.{least[1]}"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    return ""
