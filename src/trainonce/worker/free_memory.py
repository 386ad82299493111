"""How much memory of this host is free."""

from __future__ import annotations

from pathlib import Path

SHARE = 0.75
"""Of the memory that is free, what copies of one kind on this host may take, of all ranks."""


def available_bytes() -> int:
    """Return how many bytes can be had without swapping; very many where that is not known."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62
