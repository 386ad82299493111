"""From the words of an option or a setting to sources that can be read on this host."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce.errors import SourceError
from trainonce.fleet.sources.amd import AmdSource
from trainonce.fleet.sources.dcgm import DcgmSource
from trainonce.fleet.sources.follow import FollowedSource
from trainonce.fleet.sources.host import HostSource
from trainonce.fleet.sources.kernel_log import KernelLogSource
from trainonce.fleet.sources.nvml import NvmlSource
from trainonce.fleet.sources.words import AUTO, check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.clock import Clock
    from trainonce.fleet.signals import Source


@dataclass(kw_only=True)
class Sources:
    """What can be read, and why the rest cannot.

    Args:
        sources: To read.
        missing: Word or name of a source -> why it cannot be read.
        pci: PCI address -> device.
    """

    sources: list[Source] = field(default_factory=lambda: [])
    missing: dict[str, str] = field(default_factory=lambda: {})
    pci: dict[str, str] = field(default_factory=lambda: {})

    def close(self) -> None:
        """Close what wants it."""
        for source in self.sources:
            if isinstance(source, KernelLogSource):
                source.close()


def open_sources(words: Sequence[str], *, host: str, clock: Clock, disk: Path) -> Sources:
    """Open the sources that `words` name; what cannot be read here is said, and left out.

    Args:
        words: As in `trainonce.fleet.sources.words.HINT`.
        host: Name of this host.
        clock: Stamps the readings.
        disk: A path on the disk that matters.

    Raises:
        ConfigError: A word names no source.
    """
    check(words)
    chosen = [each for word in words for each in (AUTO if word == "auto" else (word,))]
    found = Sources()
    for word in dict.fromkeys(chosen):
        kind, _, rest = word.partition(":")
        try:
            if kind == "nvml":
                nvml = NvmlSource(host, clock)
                found.pci |= nvml.pci_devices()
                found.sources.append(nvml)
            elif kind == "amd":
                found.sources.append(AmdSource(host, clock))
            elif kind == "host":
                found.sources.append(HostSource(host, clock, disk))
            elif kind == "kernel-log":
                found.sources.append(KernelLogSource(host, clock))
            elif kind == "dcgm":
                found.sources.append(DcgmSource(rest, host, clock))
            elif kind == "file":
                found.sources.append(FollowedSource(Path(rest)))
        except SourceError as error:
            found.missing[word] = error.message
    return found
