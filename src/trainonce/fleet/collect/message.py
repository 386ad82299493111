"""What an agent sends: one JSON object, in which nothing is trusted unchecked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce.errors import TrainOnceError, WireError
from trainonce.fleet.signals import MAX_NAME_CHARS, Reading, from_record

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = "trainonce-host-1"
MAX_BYTES = 1 << 20
MAX_DEVICES = 256
MAX_JOBS = 64
MAX_REASONS = 16
ACTIONS = ("none", "note", "suspect", "migrate")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_MAX_REASON_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class DeviceVerdict:
    """What the agent thinks of a device; `device` is "" for the host."""

    device: str
    action: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job whose launcher runs on the host."""

    job: str
    step: int
    ranks: int
    spares_ready: int
    incidents: int


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """All that one host says at once.

    Args:
        host: Its name.
        readings: The last of each device, and of the host.
        verdicts: On each of them.
        jobs: That run there.
        missing: Sources that cannot be read, and why.
    """

    host: str
    readings: tuple[Reading, ...] = ()
    verdicts: tuple[DeviceVerdict, ...] = ()
    jobs: tuple[JobStatus, ...] = ()
    missing: dict[str, str] = field(default_factory=lambda: {})

    def encode(self) -> bytes:
        """Return the report as JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                "host": self.host,
                "readings": [reading.to_record() for reading in self.readings],
                "verdicts": [vars(verdict) for verdict in self.verdicts],
                "jobs": [vars(job) for job in self.jobs],
                "missing": self.missing,
            },
            allow_nan=False,
            separators=(",", ":"),
        ).encode()


def decode(data: bytes) -> HostReport:
    """Return the report in `data`.

    Raises:
        WireError: It is none, is too large, or holds a value that cannot be.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"a report of {len(data)} bytes: at most {MAX_BYTES} are taken")
    try:
        raw = json.loads(data, parse_constant=_no_constant)
        if raw["format"] != FORMAT:
            raise WireError(f"its format is {raw['format']!r:.60}, not {FORMAT!r}")
        host = _name(raw["host"])
        readings = _list(raw["readings"], MAX_DEVICES, lambda each: _reading(each, host))
        return HostReport(
            host=host,
            readings=tuple({reading.device: reading for reading in readings}.values()),
            verdicts=tuple(_list(raw["verdicts"], MAX_DEVICES, _verdict)),
            jobs=tuple(_list(raw["jobs"], MAX_JOBS, _job)),
            missing={
                _text(key, MAX_NAME_CHARS): _text(value, _MAX_REASON_CHARS)
                for key, value in list(raw["missing"].items())[:MAX_REASONS]
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WireError(f"not a report: {type(error).__name__}: {error!s:.100}") from error
    except WireError:
        raise
    except TrainOnceError as error:
        raise WireError(f"not a report: {error.message:.200}") from error


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _list(value: Any, most: int, read: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"a list of at most {most} was expected")
    return [read(each) for each in value]


def is_name(value: object) -> bool:
    """Tell whether `value` can name a host, a device or a job."""
    return (
        isinstance(value, str)
        and len(value) <= MAX_NAME_CHARS
        and _NAME.fullmatch(value) is not None
    )


def _name(value: Any) -> str:
    if not is_name(value):
        raise ValueError(f"{value!r:.60} is no name")
    return value


def _device(value: Any) -> str:
    return "" if value == "" else _name(value)


def _text(value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    return value[:most]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r:.60} is no count")
    return value


def _reading(value: Any, host: str) -> Reading:
    # Of its own devices only, whatever it says.
    reading = from_record({**value, "host": host})
    _device(reading.device)
    for number in vars(reading).values():
        if isinstance(number, int | float) and not number < 1e18:
            raise ValueError(f"{number!r} is no reading")
    return reading


def _verdict(value: Any) -> DeviceVerdict:
    if value["action"] not in ACTIONS:
        raise ValueError(f"unknown action {value['action']!r:.60}")
    return DeviceVerdict(
        device=_device(value["device"]),
        action=value["action"],
        reasons=tuple(
            _list(value["reasons"], MAX_REASONS, lambda each: _text(each, _MAX_REASON_CHARS))
        ),
    )


def _job(value: Any) -> JobStatus:
    return JobStatus(
        job=_name(value["job"]),
        step=_count(value["step"]),
        ranks=_count(value["ranks"]),
        spares_ready=_count(value["spares_ready"]),
        incidents=_count(value["incidents"]),
    )
