"""From the words of an option or a setting to sources that can be read on this host."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError, SourceError
from trainonce.fleet.sources.amd import AmdSource
from trainonce.fleet.sources.dcgm import DcgmSource
from trainonce.fleet.sources.follow import FollowedSource
from trainonce.fleet.sources.host import HostSource
from trainonce.fleet.sources.kernel_log import KernelLogSource
from trainonce.fleet.sources.nvml import NvmlSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from trainonce.clock import Clock
    from trainonce.fleet.signals import Source

_AUTO = ("nvml", "amd", "host", "kernel-log")
HINT = "auto, none, nvml, amd, host, kernel-log, dcgm:URL or file:PATH, with commas"


@dataclass(kw_only=True)
class Sources:
    """What can be read, and why the rest cannot."""

    sources: list[Source] = field(default_factory=lambda: [])
    missing: dict[str, str] = field(default_factory=lambda: {})


def check(words: Iterable[str]) -> None:
    """Check the words without opening anything.

    Raises:
        ConfigError: One of them names no source.
    """
    for word in words:
        kind, colon, rest = word.partition(":")
        plain = word in (*_AUTO, "auto", "none")
        if plain or (kind in ("dcgm", "file") and colon and rest):
            continue
        raise ConfigError(f"{word!r} is no source of health signals", hint=HINT)


def open_sources(words: Sequence[str], *, host: str, clock: Clock, disk: Path) -> Sources:
    """Open the sources that `words` name; what cannot be read here is said, and left out.

    Args:
        words: As in `HINT`.
        host: Name of this host.
        clock: Stamps the readings.
        disk: A path on the disk that matters.

    Raises:
        ConfigError: A word names no source.
    """
    check(words)
    chosen = [each for word in words for each in (_AUTO if word == "auto" else (word,))]
    found = Sources()
    pci: dict[str, str] = {}
    for word in dict.fromkeys(chosen):
        kind, _, rest = word.partition(":")
        try:
            if kind == "nvml":
                nvml = NvmlSource(host, clock)
                pci = nvml.pci_devices()
                found.sources.append(nvml)
            elif kind == "amd":
                found.sources.append(AmdSource(host, clock))
            elif kind == "host":
                found.sources.append(HostSource(host, clock, disk))
            elif kind == "kernel-log":
                found.sources.append(KernelLogSource(host, clock, pci))
            elif kind == "dcgm":
                found.sources.append(DcgmSource(rest, host, clock))
            elif kind == "file":
                found.sources.append(FollowedSource(Path(rest)))
        except SourceError as error:
            found.missing[word] = str(error)
    return found
