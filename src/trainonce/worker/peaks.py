"""What devices compute at best, for the utilisation on the progress line."""

from __future__ import annotations

import torch

# Dense bf16 operations per second, from the vendors' data sheets. The first name that is
# contained in the device's counts, so longer ones come first.
_PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
)


def peak_flops(device: torch.device) -> int:
    """Return the dense bf16 operations per second of `device`; 0 where they are not known."""
    if device.type != "cuda":
        return 0
    return find_peak(torch.cuda.get_device_name(device))


def find_peak(name: str) -> int:
    """Return the peak of the device called `name`, or 0."""
    return next((int(peak) for part, peak in _PEAKS if part.lower() in name.lower()), 0)
