"""Health signals as they come: read on a thread of its own, judged, and handed over.

A driver that is failing may not answer at all, so nobody else waits for it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError, SourceError
from trainonce.fleet.moves import MoveLimits
from trainonce.fleet.sources.words import check

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainonce.clock import Clock
    from trainonce.fleet.health import Verdict
    from trainonce.fleet.signals import Reading
    from trainonce.fleet.sources.choose import Sources

_JOIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class HealthSettings(MoveLimits):
    """What is read of a host, how often, and what may follow; `[health]` in settings.toml.

    Args:
        sources: Words of `trainonce.fleet.sources.words.HINT`.
        every_s: Time between two readings.
        move: Whether a rank is moved away from a failing device, or only told about.
    """

    sources: tuple[str, ...] = ("auto",)
    every_s: float = 10.0
    move: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.sources)
        if not 0.01 <= self.every_s <= 3600:
            raise ConfigError(
                f"health signals every {self.every_s!r} s", hint="give 0.01 to 3600 seconds"
            )

    @property
    def is_off(self) -> bool:
        """Whether nothing is to be read."""
        return set(self.sources) <= {"none"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The verdict on one device has changed."""

    host: str
    device: str
    verdict: Verdict


@dataclass(kw_only=True)
class News:
    """What came since the last time it was asked for.

    Args:
        findings: Verdicts that changed.
        missing: Source to why it cannot be read, those that could before.
        pci: PCI address to device.
        use: (host, device) to the share of the time in which it was busy.
    """

    findings: list[Finding] = field(default_factory=lambda: [])
    missing: dict[str, str] = field(default_factory=lambda: {})
    pci: dict[str, str] = field(default_factory=lambda: {})
    use: dict[tuple[str, str], float] = field(default_factory=lambda: {})


class Feed:
    """Reads sources again and again, and keeps what is new until it is taken.

    Args:
        open_them: Opens the sources; called on the feed's thread, since that may take its time.
        every_s: Time between two readings; less while a temperature rises towards its limit.
    """

    def __init__(self, open_them: Callable[[], Sources], every_s: float) -> None:
        self._open = open_them
        self._every_s = every_s
        self._lock = threading.Lock()
        self._news = News()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainonce-health", daemon=True)
        self._readings: list[Reading] = []

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def take(self) -> News:
        """Return what is new, and forget it."""
        with self._lock:
            news, self._news = self._news, News()
        return news

    def close(self) -> None:
        """Stop reading; a driver that does not answer is left behind."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        # Here, and not above: whoever starts a job should not wait for numpy to load.
        from trainonce.fleet.health import Action
        from trainonce.fleet.watch import HealthWatch

        opened = self._open()
        watch = HealthWatch()
        before: dict[tuple[str, str], Action] = {}
        silent: set[str] = set()
        with self._lock:
            self._news.missing |= opened.missing
        while not self._stop.is_set():
            readings, missing = read_all(opened)
            fresh = {name: why for name, why in missing.items() if name not in silent}
            silent = set(missing)
            verdicts = watch.observe(readings)
            changed = [
                Finding(host=host, device=device, verdict=verdict)
                for (host, device), verdict in verdicts.items()
                if before.get((host, device), Action.NONE) is not verdict.action
            ]
            before |= {key: verdict.action for key, verdict in verdicts.items()}
            with self._lock:
                self._news.findings += changed
                self._news.missing |= fresh
                self._news.pci = dict(opened.pci)
                self._news.use |= {
                    (one.host, one.device): one.utilisation
                    for one in readings
                    if one.utilisation is not None
                }
            self._stop.wait(watch.next_look_s(self._every_s))
        opened.close()


def read_all(opened: Sources) -> tuple[list[Reading], dict[str, str]]:
    """Return what all sources say now, and why some say nothing."""
    readings: list[Reading] = []
    missing: dict[str, str] = {}
    for source in opened.sources:
        try:
            found = source.read()
        except SourceError as error:
            missing[source.name] = error.message
            continue
        except Exception as error:  # a library's own bug must not end the others
            missing[source.name] = f"{source.name} failed: {type(error).__name__}: {error}"
            continue
        opened.pci.update(getattr(source, "pci", {}))
        readings += found
    # A device that the kernel log knows by its address is the one that the driver numbers.
    return [
        replace(reading, device=opened.pci.get(reading.device.removeprefix("pci:"), reading.device))
        if reading.device.startswith("pci:")
        else reading
        for reading in readings
    ], missing


def open_for(settings: HealthSettings, *, host: str, clock: Clock, disk: Path) -> Feed:
    """Return a feed that reads what `settings` name on this host; it is not started."""

    def open_them() -> Sources:
        from trainonce.fleet.sources.choose import open_sources

        return open_sources(settings.sources, host=host, clock=clock, disk=disk)

    return Feed(open_them, settings.every_s)
