"""Readings of NVIDIA devices, through NVML (`pip install 'trainonce[energy]'`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainonce.errors import SourceError
from trainonce.fleet.signals import Reading, pci_address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.clock import Clock

_MAX_EVENTS = 64
_FIELDS = {
    "recovery_action": "GET_GPU_RECOVERY_ACTION",
    "nvlink_replays": "NVLINK_REPLAY_ERROR_COUNT_TOTAL",
    "nvlink_recoveries": "NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
    "pending": "REMAPPED_PENDING",
    "failed": "REMAPPED_FAILURE",
    # How far from the present limit they lie, in degrees.
    "slowdown": "TEMPERATURE_SLOWDOWN_TLIMIT",
    "shutdown": "TEMPERATURE_SHUTDOWN_TLIMIT",
}
# By the numbers of nvml.h's nvmlValueType_t.
_VALUES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class NvmlSource:
    """Everything that the policy wants to know of the NVIDIA devices of this host.

    What a device does not support is not known. How long a device was slowed is counted from one
    reading to the next: a reason that holds now held since the reading before.

    Args:
        host: Name of this host.
        clock: Stamps the readings.
        nvml: The `pynvml` module, for tests.

    Raises:
        SourceError: There is no pynvml, no driver, or no device.
    """

    name = "nvml"

    def __init__(self, host: str, clock: Clock, nvml: Any = None) -> None:
        self._host = host
        self._clock = clock
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
        except ImportError as error:
            raise SourceError(
                "NVML is not read: nvidia-ml-py is not installed",
                hint="pip install 'trainonce[energy]'",
            ) from error
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except Exception as error:  # NVML's errors share no useful base
            raise SourceError(f"NVML is not read: {error}") from error
        if not self._handles:
            raise SourceError("NVML is not read: it sees no device")
        self._events = self._register_events()
        self._last_s: float | None = None
        self._throttled_s = [[0.0, 0.0] for _ in self._handles]

    def read(self) -> Sequence[Reading]:
        """Return one reading of each device."""
        now_s = self._clock.mono_s()
        since_s = 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        xids = self._take_events()
        return [
            Reading(
                mono_s=now_s,
                host=self._host,
                device=f"gpu{index}",
                xids=tuple(xids.get(index, ())),
                **self._read_device(index, handle, since_s),
            )
            for index, handle in enumerate(self._handles)
        ]

    def pci_devices(self) -> dict[str, str]:
        """Return the device of each PCI address ("0000:3b:00"), as the kernel log writes it."""
        found: dict[str, str] = {}
        for index, handle in enumerate(self._handles):
            info = self._ask(lambda handle=handle: self._nvml.nvmlDeviceGetPciInfo(handle))
            if info is None:
                continue
            bus = info.busId.decode() if isinstance(info.busId, bytes) else str(info.busId)
            found[pci_address(bus)] = f"gpu{index}"
        return found

    def _read_device(self, index: int, handle: Any, since_s: float) -> dict[str, Any]:
        nvml = self._nvml
        lost: list[bool] = []

        def ask(function: Callable[[], Any]) -> Any:
            return self._ask(function, lost)

        fields = self._fields(handle, lost)
        rows = ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
        use = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        energy_mj = ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        nvlink = [fields.get(name) for name in ("nvlink_replays", "nvlink_recoveries")]
        values: dict[str, Any] = {
            **self._heat(handle, fields, lost),
            **self._slowed(index, handle, since_s, lost),
            "utilisation": None if use is None else use.gpu / 100,
            "energy_j": None if energy_mj is None else energy_mj / 1000,
            "recovery_action": fields.get("recovery_action"),
            "row_remap_pending": fields.get("pending") if rows is None else rows[2],
            "row_remap_failed": fields.get("failed") if rows is None else rows[3],
            "ecc_uncorrected_total": self._ecc(handle, "UNCORRECTED", lost),
            "ecc_corrected_total": self._ecc(handle, "CORRECTED", lost),
            "nvlink_errors_total": None if None in nvlink else sum(n for n in nvlink if n),
            "pcie_replays_total": ask(lambda: nvml.nvmlDeviceGetPcieReplayCounter(handle)),
        }
        return {**values, "lost": int(bool(lost))}

    def _heat(self, handle: Any, fields: dict[str, int], lost: list[bool]) -> dict[str, Any]:
        """Return temperature and limits; from Ada on a device may tell only how far they are."""
        nvml = self._nvml
        now_c = self._ask(
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), lost
        )
        margin = self._ask(lambda: nvml.nvmlDeviceGetMarginTemperature(handle), lost)
        found = {"temperature_c": now_c}
        for name in ("slowdown", "shutdown"):
            which = getattr(nvml, f"NVML_TEMPERATURE_THRESHOLD_{name.upper()}")
            limit = self._ask(
                lambda which=which: nvml.nvmlDeviceGetTemperatureThreshold(handle, which), lost
            )
            if limit is None and None not in (now_c, margin, fields.get(name)):
                limit = now_c + margin - fields[name]
            found[f"{name}_c"] = limit
        return found

    def _slowed(
        self, index: int, handle: Any, since_s: float, lost: list[bool]
    ) -> dict[str, float | None]:
        """Return for how long the hardware has slowed the device, by why."""
        nvml, slowed_s = self._nvml, self._throttled_s[index]
        names = ("throttled_thermal_s", "throttled_brake_s")
        reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle), lost)
        if reasons is None:
            return dict.fromkeys(names)
        masks = (
            nvml.nvmlClocksEventReasonHwThermalSlowdown,
            nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
        )
        for place, mask in enumerate(masks):
            slowed_s[place] += since_s if reasons & mask else 0.0
        return dict(zip(names, slowed_s, strict=True))

    def _ecc(self, handle: Any, name: str, lost: list[bool]) -> Any:
        nvml = self._nvml
        which = getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{name}")
        return self._ask(
            lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, which, nvml.NVML_VOLATILE_ECC), lost
        )

    def _fields(self, handle: Any, lost: list[bool]) -> dict[str, int]:
        """Return the fields that are known; the ids that this pynvml lacks are left out."""
        nvml = self._nvml
        wanted = {
            name: getattr(nvml, f"NVML_FI_DEV_{field}")
            for name, field in _FIELDS.items()
            if hasattr(nvml, f"NVML_FI_DEV_{field}")
        }
        answers = self._ask(
            lambda: nvml.nvmlDeviceGetFieldValues(handle, list(wanted.values())), lost
        )
        if answers is None:
            return {}
        return {
            name: int(getattr(answer.value, _VALUES[answer.valueType]))
            for name, answer in zip(wanted, answers, strict=True)
            if answer.nvmlReturn == nvml.NVML_SUCCESS and answer.valueType < len(_VALUES)
        }

    def _register_events(self) -> Any:
        """Ask for XIDs. None where the driver gives none: the kernel log may have them."""
        nvml = self._nvml
        events = self._ask(nvml.nvmlEventSetCreate)
        if events is None:
            return None
        for handle in self._handles:
            self._ask(
                lambda handle=handle: nvml.nvmlDeviceRegisterEvents(
                    handle, nvml.nvmlEventTypeXidCriticalError, events
                )
            )
        return events

    def _take_events(self) -> dict[int, list[int]]:
        nvml, found = self._nvml, dict[int, list[int]]()
        if self._events is None:
            return found
        for _ in range(_MAX_EVENTS):
            event = self._ask(lambda: nvml.nvmlEventSetWait_v2(self._events, 0))
            if event is None:  # a time-out: there is none
                break
            index = self._ask(lambda event=event: nvml.nvmlDeviceGetIndex(event.device))
            if index is not None and event.eventType == nvml.nvmlEventTypeXidCriticalError:
                found.setdefault(int(index), []).append(int(event.eventData))
        return found

    def _ask(self, function: Callable[[], Any], lost: list[bool] | None = None) -> Any:
        """Return what NVML answers, or None; note in `lost` that the device is gone."""
        try:
            return function()
        except Exception as error:  # whatever one question meets, the others are still asked
            if (
                lost is not None
                and getattr(error, "value", None) == self._nvml.NVML_ERROR_GPU_IS_LOST
            ):
                lost.append(True)
            return None
