"""Readings of a dcgm-exporter: what it shows to Prometheus, it shows to us."""

from __future__ import annotations

import math
import re
import urllib.request
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError, SourceError
from trainonce.fleet.signals import MAX_NAME_CHARS, Reading, pci_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.clock import Clock

MAX_BYTES = 8 << 20
_MAX_DEVICES = 1024
_TIMEOUT_S = 5.0

_SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>[^}]*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?\s*"
)
_LABEL = re.compile(r'(?P<key>[a-zA-Z_][a-zA-Z0-9_]*)="(?P<value>(?:[^"\\]|\\.)*)"')

# Metric of the exporter -> field of a reading. Those that its default list leaves out are used
# where the operator has added them.
_GAUGES = {
    "DCGM_FI_DEV_GPU_TEMP": "temperature_c",
    "DCGM_FI_DEV_SLOWDOWN_TEMP": "slowdown_c",
    "DCGM_FI_DEV_SHUTDOWN_TEMP": "shutdown_c",
    "DCGM_FI_DEV_ROW_REMAP_FAILURE": "row_remap_failed",
    "DCGM_FI_DEV_ROW_REMAP_PENDING": "row_remap_pending",
    "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": "ecc_uncorrected_total",
    "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL": "ecc_corrected_total",
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": "pcie_replays_total",
}
_NVLINK = (
    "DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL",
    "DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
)
_REASONS = ("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS")
_THERMAL, _BRAKE = 0x40, 0x80
# What DCGM answers where it knows nothing, and why (dcgm_structs.h); exporters leave it out.
_BLANK = {
    float(base + why) for base in (0x7FFFFFF0, 1 << 47, 0x7FFFFFFFFFFFFFF0) for why in range(4)
}
_INTEGERS = {name for name in _GAUGES.values() if not name.endswith("_c")}


def parse_metrics(text: str, pci: dict[str, str] | None = None) -> dict[str, dict[str, float]]:
    """Return metric to value by device ("gpu0") in what an exporter shows.

    Devices whose PCI address it tells are added to `pci`.

    Lines that are none of the text format, and values that are no number, are passed over: one
    bad metric must not hide the others.
    """
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line) if line.startswith("DCGM_FI_") else None
        if match is None:
            continue
        labels = {m["key"]: m["value"] for m in _LABEL.finditer(match["labels"] or "")}
        # A slice of a device (MIG) repeats the device's values: one of them is enough.
        index = labels.get("gpu", "")
        try:
            value = float(match["value"])
        except ValueError:
            continue
        if not index.isdigit() or not math.isfinite(value) or len(index) > 4 or value in _BLANK:
            continue
        if f"gpu{index}" in found or len(found) < _MAX_DEVICES:
            found.setdefault(f"gpu{int(index)}", {})[match["name"]] = value
            if pci is not None and "pci_bus_id" in labels:
                pci[pci_address(labels["pci_bus_id"])] = f"gpu{int(index)}"
    return found


class DcgmSource:
    """The devices that a dcgm-exporter knows.

    The exporter shows the last XID and not each: one that stood there when we first looked is
    history, and the same one twice is seen once. It does not show the driver's advice
    (`recovery_action`); NVML does.

    Args:
        url: Of its metrics, such as `http://127.0.0.1:9400/metrics`.
        host: The host whose devices it shows.
        clock: Stamps the readings.

    Raises:
        ConfigError: `url` is none.
    """

    name = "dcgm"

    def __init__(self, url: str, host: str, clock: Clock) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{url!r} is no http or https URL", hint="dcgm:http://127.0.0.1:9400/metrics"
            )
        self._url = url
        self._host = host[:MAX_NAME_CHARS]
        self._clock = clock
        self._last_xid: dict[str, int] = {}
        self._throttled_s: dict[str, list[float]] = {}
        self._last_s: float | None = None
        self.pci: dict[str, str] = {}

    def read(self) -> Sequence[Reading]:
        """Return one reading of each device.

        Raises:
            SourceError: The exporter does not answer, or with something else.
        """
        text = self._fetch()
        now_s = self._clock.mono_s()
        since_s = 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        return [
            Reading(
                mono_s=now_s,
                host=self._host,
                device=device,
                **self._fields(device, metrics, since_s),
            )
            for device, metrics in sorted(parse_metrics(text, self.pci).items())
        ]

    def _fetch(self) -> str:
        try:
            with urllib.request.urlopen(self._url, timeout=_TIMEOUT_S) as answer:
                data = answer.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._url} is not read: {error}") from error
        if len(data) > MAX_BYTES:
            raise SourceError(f"{self._url} answers with more than {MAX_BYTES >> 20} MiB")
        return data.decode(errors="replace")

    def _fields(self, device: str, metrics: dict[str, float], since_s: float) -> dict[str, Any]:
        fields: dict[str, Any] = {
            field: int(metrics[name]) if field in _INTEGERS else metrics[name]
            for name, field in _GAUGES.items()
            if name in metrics
        }
        links = [metrics[name] for name in _NVLINK if name in metrics]
        if links:
            fields["nvlink_errors_total"] = int(sum(links))
        if "DCGM_FI_DEV_GPU_UTIL" in metrics:
            fields["utilisation"] = metrics["DCGM_FI_DEV_GPU_UTIL"] / 100
        if "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION" in metrics:
            fields["energy_j"] = metrics["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"] / 1000
        reasons = next((metrics[name] for name in _REASONS if name in metrics), None)
        if reasons is not None:
            slowed = self._throttled_s.setdefault(device, [0.0, 0.0])
            for place, mask in enumerate((_THERMAL, _BRAKE)):
                slowed[place] += since_s if int(reasons) & mask else 0.0
            fields["throttled_thermal_s"], fields["throttled_brake_s"] = slowed
        xid = int(metrics.get("DCGM_FI_DEV_XID_ERRORS", 0))
        if xid and self._last_xid.get(device, xid) != xid:
            fields["xids"] = (xid,)
        self._last_xid[device] = xid
        return fields
