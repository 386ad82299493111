"""Readings of the host itself: memory, disk, and ports that went down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from trainonce.fleet.signals import Reading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.clock import Clock

# An InfiniBand port counts what an Ethernet port shows as carrier changes.
_PORTS = ("class/infiniband/*/ports/*/counters/link_downed", "class/net/*/carrier_down_count")


class HostSource:
    """Free memory and disk, memory pressure, and links that were lost.

    Args:
        host: Name of this host.
        clock: Stamps the readings.
        disk: A path on the disk that matters: that of the checkpoints.
        sys: Where the kernel shows its devices.
        proc: Where it shows its processes.
    """

    name = "host"

    def __init__(
        self,
        host: str,
        clock: Clock,
        disk: Path,
        *,
        sys: Path = Path("/sys"),
        proc: Path = Path("/proc"),
    ) -> None:
        self._host = host
        self._clock = clock
        self._disk = disk
        self._sys = sys
        self._proc = proc

    def read(self) -> Sequence[Reading]:
        """Return one reading of the host."""
        memory = psutil.virtual_memory()
        return [
            Reading(
                mono_s=self._clock.mono_s(),
                host=self._host,
                memory_free_share=memory.available / memory.total,
                memory_stalled_share=self._stalled_share(),
                disk_free_share=self._disk_free_share(),
                link_downed_total=self._link_downed(),
            )
        ]

    def _disk_free_share(self) -> float | None:
        folder = self._disk
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            disk = psutil.disk_usage(str(folder))
        except OSError:
            return None
        return disk.free / disk.total if disk.total else None

    def _stalled_share(self) -> float | None:
        """Read "full avg60" of the kernel's pressure-stall information, if it keeps it."""
        try:
            lines = (self._proc / "pressure" / "memory").read_text().splitlines()
            full = next(line for line in lines if line.startswith("full"))
            return float(full.partition("avg60=")[2].split()[0]) / 100
        except (OSError, StopIteration, ValueError, IndexError):
            return None

    def _link_downed(self) -> int | None:
        counts: list[int] = []
        for pattern in _PORTS:
            for path in self._sys.glob(pattern):
                # The container's own interfaces come and go with it.
                if "/net/lo/" in str(path) or "/net/veth" in str(path):
                    continue
                try:
                    counts.append(int(path.read_text()))
                except (OSError, ValueError):
                    continue
        return sum(counts) if counts else None
