"""The words that name sources of health signals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

AUTO = ("nvml", "amd", "host", "kernel-log")
HINT = "auto, none, nvml, amd, host, kernel-log, dcgm:URL or file:PATH, with commas"


def check(words: Iterable[str]) -> None:
    """Check the words without opening anything.

    Raises:
        ConfigError: One of them names no source.
    """
    for word in words:
        kind, colon, rest = word.partition(":")
        plain = word in (*AUTO, "auto", "none")
        if plain or (kind in ("dcgm", "file") and colon and rest):
            continue
        raise ConfigError(f"{word!r} is no source of health signals", hint=HINT)
