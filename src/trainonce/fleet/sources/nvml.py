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

        remapped = ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
        fields = self._fields(handle, lost)
        use = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        if reasons is not None:
            for place, mask in enumerate(
                (
                    nvml.nvmlClocksEventReasonHwThermalSlowdown,
                    nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
                )
            ):
                self._throttled_s[index][place] += since_s if reasons & mask else 0.0
        nvlink = [fields.get(name) for name in ("nvlink_replays", "nvlink_recoveries")]
        values: dict[str, Any] = {
            "temperature_c": ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            "slowdown_c": self._threshold(handle, "SLOWDOWN", lost),
            "shutdown_c": self._threshold(handle, "SHUTDOWN", lost),
            "throttled_thermal_s": None if reasons is None else self._throttled_s[index][0],
            "throttled_brake_s": None if reasons is None else self._throttled_s[index][1],
            "utilisation": None if use is None else use.gpu / 100,
            "recovery_action": fields.get("recovery_action"),
            "row_remap_pending": None if remapped is None else int(remapped[2]),
            "row_remap_failed": None if remapped is None else int(remapped[3]),
            "ecc_uncorrected_total": self._ecc(handle, "UNCORRECTED", lost),
            "ecc_corrected_total": self._ecc(handle, "CORRECTED", lost),
            "nvlink_errors_total": None if None in nvlink else sum(n for n in nvlink if n),
            "pcie_replays_total": ask(lambda: nvml.nvmlDeviceGetPcieReplayCounter(handle)),
        }
        return {**values, "lost": int(bool(lost))}

    def _threshold(self, handle: Any, name: str, lost: list[bool]) -> Any:
        nvml = self._nvml
        which = getattr(nvml, f"NVML_TEMPERATURE_THRESHOLD_{name}")
        return self._ask(lambda: nvml.nvmlDeviceGetTemperatureThreshold(handle, which), lost)

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
            name: identity
            for name, identity in (
                ("recovery_action", getattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)),
                (
                    "nvlink_replays",
                    getattr(nvml, "NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL", None),
                ),
                (
                    "nvlink_recoveries",
                    getattr(nvml, "NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL", None),
                ),
            )
            if identity is not None
        }
        answers = self._ask(
            lambda: nvml.nvmlDeviceGetFieldValues(handle, list(wanted.values())), lost
        )
        if answers is None:
            return {}
        return {
            name: _number(nvml, answer)
            for name, answer in zip(wanted, answers, strict=True)
            if answer.nvmlReturn == nvml.NVML_SUCCESS
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


def _number(nvml: Any, answer: Any) -> int:
    kind, value = answer.valueType, answer.value
    if kind == nvml.NVML_VALUE_TYPE_UNSIGNED_INT:
        return int(value.uiVal)
    if kind == nvml.NVML_VALUE_TYPE_UNSIGNED_LONG:
        return int(value.ulVal)
    if kind == nvml.NVML_VALUE_TYPE_DOUBLE:
        return int(value.dVal)
    return int(value.ullVal)
