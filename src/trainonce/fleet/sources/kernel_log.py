"""Readings from the kernel log: XIDs of the NVIDIA driver, and faults of the host."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce.errors import SourceError
from trainonce.fleet.signals import Reading, pci_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trainonce.clock import Clock

_RECORD_BYTES = 8192
_MAX_RECORDS = 10_000

_PCI = r"(?P<pci>[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2})(?:\.[0-9a-f])?"
_XID = re.compile(rf"NVRM: Xid \(PCI:{_PCI}\): (?P<xid>\d+)\b", re.IGNORECASE)

# What the kernel writes, by the name that `trainonce.fleet.health` knows. The first that fits
# counts. A log is written for people, so each pattern asks for the words of the fault itself.
FAULTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("gpu_lost", rf"NVRM: GPU at (PCI:)?{_PCI}:? .*fallen off the bus"),
        ("gpu_lost", rf"amdgpu {_PCI}.*(device lost from bus|GPU is lost)"),
        ("gpu_reset", rf"amdgpu {_PCI}.*GPU reset (begin|\(\d+\) succeeded|failed)"),
        ("gpu_memory", rf"amdgpu {_PCI}.*uncorrectable hardware errors detected"),
        ("machine_check", r"mce: \[Hardware Error\]: (Machine check|CPU \d+: Machine Check)"),
        ("host_memory", r"EDAC \w+: \d+ UE |Memory failure: 0x[0-9a-f]+: "),
        ("pcie_fatal", r"AER: .*(Uncorrect\w* \(Fatal\)|Fatal error)"),
        ("link_down", r"mlx5_core .*Link down|\b(eth|en|ib)\w+: (NIC )?Link (is )?Down"),
        ("disk", r"I/O error, dev \w+, sector|nvme\d+: controller is down|nvme.* I/O .*timeout"),
        ("out_of_memory", r"Out of memory: Killed process|Memory cgroup out of memory: Killed"),
    )
)
# In several lines, the first of which names the device: "NVRM: The NVIDIA GPU 0000:b3:00.0",
# and two further on "NVRM: fallen off the bus and is not responding to commands."
_LOST_BEGIN = re.compile(rf"NVRM: The NVIDIA GPU {_PCI}\s*$", re.IGNORECASE)
_LOST_END = re.compile(r"NVRM: fallen off the bus", re.IGNORECASE)


class LogParser:
    """Takes lines of the kernel log in, and collects what they tell of each device.

    A device is named by its address: "pci:0000:3b:00".
    """

    def __init__(self) -> None:
        self._losing = ""

    def parse(self, lines: Iterable[str]) -> dict[str, tuple[list[int], list[str]]]:
        """Return XIDs and faults by device; those of the host are under ""."""
        found: dict[str, tuple[list[int], list[str]]] = {}
        for line in lines:
            if match := _XID.search(line):
                found.setdefault(_device(match["pci"]), ([], []))[0].append(int(match["xid"]))
                continue
            if match := _LOST_BEGIN.search(line):
                self._losing = _device(match["pci"])
                continue
            if self._losing and _LOST_END.search(line):
                found.setdefault(self._losing, ([], []))[1].append("gpu_lost")
                self._losing = ""
                continue
            if "NVRM:" not in line:
                self._losing = ""
            for name, pattern in FAULTS:
                if match := pattern.search(line):
                    pci = match.groupdict().get("pci")
                    device = _device(pci) if pci and name.startswith("gpu") else ""
                    found.setdefault(device, ([], []))[1].append(name)
                    break
        return found


def _device(pci: str) -> str:
    return f"pci:{pci_address(pci)}"


class KernelLogSource:
    """What the kernel log says from now on.

    Args:
        host: Name of this host.
        clock: Stamps the readings.
        path: The log.

    Raises:
        SourceError: It may not be read, or there is none.
    """

    name = "kernel-log"

    def __init__(
        self,
        host: str,
        clock: Clock,
        path: Path = Path("/dev/kmsg"),
    ) -> None:
        self._host = host
        self._clock = clock
        self._parser = LogParser()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._fd, 0, os.SEEK_END)
        except PermissionError as error:
            raise SourceError(
                f"the kernel log is not read: no permission for {path}",
                hint="run as root or with CAP_SYSLOG, or set kernel.dmesg_restrict=0",
            ) from error
        except OSError as error:
            raise SourceError(f"the kernel log is not read: {path}: {error.strerror}") from error

    def read(self) -> Sequence[Reading]:
        """Return a reading of each device that the log has spoken of since the last call."""
        found = self._parser.parse(self._new_lines())
        now_s = self._clock.mono_s()
        return [
            Reading(
                mono_s=now_s,
                host=self._host,
                device=device,
                xids=tuple(xids),
                kernel_faults=tuple(faults),
            )
            for device, (xids, faults) in found.items()
        ]

    def close(self) -> None:
        """Close the log."""
        os.close(self._fd)

    def _new_lines(self) -> list[str]:
        lines: list[str] = []
        for _ in range(_MAX_RECORDS):
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BrokenPipeError:  # some were overwritten before we came: go on with the next
                continue
            except OSError:  # nothing new
                break
            if not record:
                break
            # "6,1234,5678901,-;message", then lines of details that begin with a space.
            for line in record.decode(errors="replace").splitlines():
                head, _, text = line.partition(";")
                lines.append(text if text and head[:1].isdigit() else line)
        return lines
