"""Whether the kernel killed a process of this control group for memory."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def _events_files(cgroup: str) -> list[Path]:
    """Return the files that count kills, for the lines of /proc/self/cgroup."""
    found: list[Path] = []
    for line in cgroup.splitlines():
        _number, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            found += [_ROOT / path.lstrip("/") / "memory.events", _ROOT / "memory.events"]
        elif "memory" in controllers.split(","):
            found.append(_ROOT / "memory" / path.lstrip("/") / "memory.oom_control")
    return found


def _count(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class OomCounter:
    """Reads the kernel's count of processes killed for memory in our control group."""

    def __init__(self) -> None:
        try:
            self._files = _events_files(Path("/proc/self/cgroup").read_text())
        except OSError:
            self._files = []
        self._seen = self._read()

    def has_grown(self) -> bool:
        """Tell whether a process was killed since the last call."""
        before, self._seen = self._seen, self._read()
        return self._seen > before

    def _read(self) -> int:
        return max((_count(path) for path in self._files), default=0)
