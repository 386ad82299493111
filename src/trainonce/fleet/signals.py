"""What can be read of a device or a host, and where readings come from."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

# Of what others send, no more is kept.
MAX_NAME_CHARS = 128
MAX_EVENTS = 64


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One look at one device, or at a host (`device` is ""). None: not known.

    Totals count since some start of their own; a total that falls was reset.

    Args:
        mono_s: When, on the host's monotonic clock.
        host: Name of the host.
        device: "gpu3", or "" for the host itself.
        temperature_c: Of the GPU core.
        slowdown_c: Where the device begins to protect itself.
        shutdown_c: Where it switches off.
        throttled_thermal_s: Total time slowed by the hardware's thermal protection.
        throttled_brake_s: Total time slowed by the power brake.
        utilisation: Share of the time that the device was busy.
        energy_j: Energy that it has used in all, joules.
        recovery_action: NVML's advice: 0 none, 1 reset, 2 reboot, 3 drain, 4 drain and reset, 5
            recover the IMEX domain, 6 reset the bus, 7 reboot the system.
        lost: 1 where the driver says that the device is gone.
        row_remap_failed: Memory rows that could not be replaced.
        row_remap_pending: Memory rows that are replaced at the next reset.
        ecc_uncorrected_total: Memory errors that could not be corrected.
        ecc_corrected_total: Those that could.
        nvlink_errors_total: Replays and recoveries of NVLink.
        pcie_replays_total: Replays of PCIe.
        link_downed_total: How often an InfiniBand or Ethernet port went down.
        memory_free_share: Of the host.
        memory_stalled_share: Of the last minute in which all processes waited for memory.
        disk_free_share: Of the disk that checkpoints go to.
        xids: Driver events since the reading before.
        kernel_faults: What else the kernel log told since then: names in
            `trainonce.fleet.sources.kernel_log.FAULTS`.
    """

    mono_s: float
    host: str
    device: str = ""
    temperature_c: float | None = None
    slowdown_c: float | None = None
    shutdown_c: float | None = None
    throttled_thermal_s: float | None = None
    throttled_brake_s: float | None = None
    utilisation: float | None = None
    energy_j: float | None = None
    recovery_action: int | None = None
    lost: int | None = None
    row_remap_failed: int | None = None
    row_remap_pending: int | None = None
    ecc_uncorrected_total: int | None = None
    ecc_corrected_total: int | None = None
    nvlink_errors_total: int | None = None
    pcie_replays_total: int | None = None
    link_downed_total: int | None = None
    memory_free_share: float | None = None
    memory_stalled_share: float | None = None
    disk_free_share: float | None = None
    xids: tuple[int, ...] = ()
    kernel_faults: tuple[str, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Return what is known, as plain values."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None and v != ()}

    def with_later(self, later: Reading) -> Reading:
        """Return what both tell of the same device; where both tell, `later` holds."""
        events = {
            "xids": self.xids + later.xids,
            "kernel_faults": self.kernel_faults + later.kernel_faults,
        }
        return dataclasses.replace(self, **{**later.to_record(), **events})


_FIELDS = {item.name: item for item in dataclasses.fields(Reading)}


def from_record(record: object) -> Reading:
    """Return the reading in `record`.

    A number that is none (NaN, infinite, negative where there are only counts) is taken as not
    known: one bad sensor must not hide the others.

    Raises:
        ConfigError: It is no reading, or holds unknown fields.
    """
    if not isinstance(record, dict) or not {"mono_s", "host"} <= set(record):
        raise ConfigError(f"no reading: {record!r}", hint="it needs at least mono_s and host")
    unknown = sorted(set(record) - set(_FIELDS))
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]!r} in a reading")
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name in ("host", "device"):
            values[name] = str(value)[:MAX_NAME_CHARS]
        elif name == "xids":
            values[name] = tuple(each for each in _events(name, value) if type(each) is int)
        elif name == "kernel_faults":
            values[name] = tuple(str(each)[:80] for each in _events(name, value))
        else:
            known = isinstance(value, int | float) and not isinstance(value, bool)
            values[name] = value if known and 0 <= value < math.inf else None
    if values["mono_s"] is None:
        raise ConfigError(f"a reading without a time: {record!r}")
    return Reading(**values)


def _events(name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"{name} of a reading is {value!r:.60}", hint="it is a list")
    return cast("list[object]", value)[:MAX_EVENTS]


def pci_address(text: str) -> str:
    """Return a PCI address in one spelling: "00000000:3B:00.0" is "0000:3b:00"."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:]}:{rest.partition('.')[0]}"


class Source(Protocol):
    """Where readings come from: a driver, an exporter, a recording, a script."""

    @property
    def name(self) -> str:
        """What the source is called."""
        ...

    def read(self) -> Sequence[Reading]:
        """Return one reading of each device and host that can be read now."""
        ...


class ScriptedSource:
    """Readings given beforehand, one batch a call; nothing after the last.

    Args:
        batches: What each call of `read` returns.
    """

    name = "scripted"

    def __init__(self, batches: Iterable[Sequence[Reading]]) -> None:
        self._batches = iter(batches)

    def read(self) -> Sequence[Reading]:
        """Return the next batch."""
        return next(self._batches, ())


class RecordedSource:
    """Readings of a file, one JSON object a line; each call returns those of one instant.

    Args:
        path: As written by `record`.

    Raises:
        ConfigError: The file cannot be read, or a line is no reading.
    """

    name = "recorded"

    def __init__(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        self._readings: list[Reading] = []
        for number, line in enumerate(lines, start=1):
            try:
                self._readings.append(from_record(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
        self._next = 0

    def read(self) -> Sequence[Reading]:
        """Return the readings of the next instant."""
        begin = self._next
        while (
            self._next < len(self._readings)
            and self._readings[self._next].mono_s == self._readings[begin].mono_s
        ):
            self._next += 1
        return self._readings[begin : self._next]


def record(readings: Iterable[Reading], path: Path) -> None:
    """Append readings to a file that `RecordedSource` plays back."""
    with path.open("a", encoding="utf-8") as file:
        for reading in readings:
            file.write(json.dumps(reading.to_record()) + "\n")
