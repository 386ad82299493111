"""The agent: reads one host's health signals again and again, and reports them to a collector.

It is a process of its own that no job waits for. A collector that is gone is tried again, later and
later; meanwhile nothing piles up, since only the last readings are worth sending.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import ssl
import urllib.error
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from trainonce.errors import ConfigError
from trainonce.fleet.collect.message import (
    ACTIONS,
    MAX_DEVICES,
    MAX_JOBS,
    MAX_REASONS,
    DeviceVerdict,
    HostReport,
    JobStatus,
    is_name,
)
from trainonce.fleet.feed import read_all
from trainonce.fleet.watch import HealthWatch
from trainonce.fleet.wire import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainonce.clock import Clock
    from trainonce.fleet.health import Verdict
    from trainonce.fleet.signals import Reading
    from trainonce.fleet.sources.choose import Sources

_TIMEOUT_S = 10.0
_MAX_DELAY_S = 60.0
# A device that no source tells of is reported for so long: the policy looks as far back.
_KEPT_S = 600.0


class Reporter:
    """Makes reports of what the sources say.

    Args:
        host: Name of this host.
        sources: To read.
        jobs: Returns the jobs that run here.
        clock: Tells how old readings are.

    Raises:
        ConfigError: `host` is no name.
    """

    def __init__(
        self, host: str, sources: Sources, jobs: Callable[[], list[JobStatus]], clock: Clock
    ) -> None:
        if not is_name(host):
            raise ConfigError(
                f"{host!r} is no name of a host",
                hint="up to 128 letters, digits, dots, colons, hyphens and underscores",
            )
        self._host = host
        self._sources = sources
        self._jobs = jobs
        self._clock = clock
        self._watch = HealthWatch()
        self._readings: dict[str, Reading] = {}
        self._read_s: dict[str, float] = {}
        self._verdicts: dict[str, Verdict] = {}

    def report(self) -> HostReport:
        """Read everything once, and return the report."""
        readings, missing = read_all(self._sources)
        readings = [reading for reading in readings if reading.host == self._host]
        for (_, device), verdict in self._watch.observe(readings).items():
            self._verdicts[device] = verdict
        self._keep(readings)
        return HostReport(
            host=self._host,
            readings=tuple(self._readings.values()),
            verdicts=tuple(
                DeviceVerdict(
                    device=device,
                    action=ACTIONS[verdict.action],
                    reasons=tuple(reason[:200] for reason in verdict.reasons[:MAX_REASONS]),
                )
                for device, verdict in self._verdicts.items()
            ),
            jobs=tuple(self._jobs()[:MAX_JOBS]),
            missing=dict(list({**self._sources.missing, **missing}.items())[:MAX_REASONS]),
        )

    def _keep(self, readings: list[Reading]) -> None:
        """Keep one reading of each device: several sources may tell of it at once."""
        now_s = self._clock.mono_s()
        fresh: dict[str, Reading] = {}
        for one in readings:
            fresh[one.device] = fresh[one.device].with_later(one) if one.device in fresh else one
        self._readings |= fresh
        self._read_s |= dict.fromkeys(fresh, now_s)
        oldest_first = sorted(self._read_s, key=lambda device: self._read_s[device])
        for place, device in enumerate(oldest_first, start=1):
            spare = len(oldest_first) - place >= MAX_DEVICES
            if spare or now_s - self._read_s[device] > _KEPT_S:
                for kept in (self._readings, self._read_s, self._verdicts):
                    kept.pop(device, None)


class Sender:
    """Sends reports to a collector.

    Args:
        url: Of the collector, such as `https://collector:9420`.
        token: What it asks for; empty on loopback only.
        ca: Certificate to trust, for a collector that made its own.

    Raises:
        ConfigError: `url` is none, or beyond loopback and without a token, or `ca` is none.
    """

    def __init__(self, url: str, *, token: str = "", ca: Path | None = None) -> None:
        scheme, host = _scheme_and_host(url)
        if not token and not is_loopback(host):
            raise ConfigError(
                f"the collector at {host} is beyond loopback and needs a token",
                hint="pass --token-file with the token that it has",
            )
        self._url = f"{url.rstrip('/')}/v1/report"
        self._token = token
        self._context = None
        if scheme == "https":
            try:
                self._context = ssl.create_default_context(cafile=ca and str(ca))
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"{ca} is no certificate: {error}") from error

    def send(self, report: HostReport) -> str:
        """Send `report`; return why it was not taken, or "" where it was."""
        request = urllib.request.Request(
            self._url,
            data=report.encode(),
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {self._token}"} if self._token else {}),
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._context):
                return ""
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code}: {_said(error)}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def _scheme_and_host(url: str) -> tuple[str, str]:
    with contextlib.suppress(ValueError):  # a port that is no number, half an IPv6 address
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.scheme, parts.hostname
    raise ConfigError(f"{url!r} is no URL", hint="such as https://collector:9420")


def _said(error: urllib.error.HTTPError) -> str:
    with error:
        try:
            return error.read(200).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException):
            return error.reason


def run(
    reporter: Reporter,
    sender: Sender,
    *,
    every_s: float,
    wait: Callable[[float], bool],
    say: Callable[[str], None],
) -> None:
    """Report until `wait` says that it is over.

    Args:
        reporter: Makes reports.
        sender: Sends them.
        every_s: Time between two reports; after a failure twice as long each time, up to a minute.
        wait: Waits so long; returns True to end.
        say: Shows a line, when the collector is lost and when it is back.
    """
    delay_s, failing = every_s, ""
    while True:
        error = sender.send(reporter.report())
        if error and not failing:
            say(f"the collector does not take reports: {error}; trying again")
        elif failing and not error:
            say("the collector takes reports again")
        failing = error
        delay_s = min(max(delay_s * 2, every_s), max(_MAX_DELAY_S, every_s)) if error else every_s
        # Not all agents at once, when a collector comes back.
        if wait(delay_s * random.uniform(0.8, 1.2) if error else delay_s):
            return
