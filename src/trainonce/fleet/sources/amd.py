"""Readings of AMD devices, through amdsmi (it comes with ROCm)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainonce.errors import SourceError
from trainonce.fleet.signals import Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.clock import Clock


class AmdSource:
    """Temperature, memory errors, retired pages, PCIe replays and use of AMD devices.

    Args:
        host: Name of this host.
        clock: Stamps the readings.
        amdsmi: The module, for tests.

    Raises:
        SourceError: There is no amdsmi, no driver, or no device.
    """

    name = "amd"

    def __init__(self, host: str, clock: Clock, amdsmi: Any = None) -> None:
        self._host = host
        self._clock = clock
        try:
            self._smi = amdsmi or importlib.import_module("amdsmi")
        except Exception as error:  # it also fails to import where its library is missing
            raise SourceError(
                "amdsmi is not read: it is not installed", hint="it comes with ROCm"
            ) from error
        try:
            self._smi.amdsmi_init()
            self._handles = list(self._smi.amdsmi_get_processor_handles())
        except Exception as error:  # amdsmi's errors share no useful base
            raise SourceError(f"amdsmi is not read: {error}") from error
        if not self._handles:
            raise SourceError("amdsmi is not read: it sees no device")

    def read(self) -> Sequence[Reading]:
        """Return one reading of each device."""
        now_s = self._clock.mono_s()
        return [
            Reading(
                mono_s=now_s, host=self._host, device=f"gpu{index}", **self._read_device(handle)
            )
            for index, handle in enumerate(self._handles)
        ]

    def _read_device(self, handle: Any) -> dict[str, Any]:
        smi = self._smi
        ecc: Any = _ask(lambda: smi.amdsmi_get_gpu_total_ecc_count(handle)) or {}
        pcie: Any = _ask(lambda: smi.amdsmi_get_pcie_info(handle)) or {}
        use: Any = _ask(lambda: smi.amdsmi_get_gpu_activity(handle)) or {}
        pages: Any = _ask(lambda: smi.amdsmi_get_gpu_bad_page_info(handle))
        busy = _number(use.get("gfx_activity"))
        return {
            "temperature_c": self._temperature(handle, "CURRENT"),
            "slowdown_c": self._temperature(handle, "CRITICAL"),
            "shutdown_c": self._temperature(handle, "EMERGENCY"),
            "ecc_uncorrected_total": _number(ecc.get("uncorrectable_count")),
            "ecc_corrected_total": _number(ecc.get("correctable_count")),
            "pcie_replays_total": _number(pcie.get("pcie_metric", {}).get("pcie_replay_count")),
            "row_remap_pending": _pending_pages(pages),
            "utilisation": None if busy is None else busy / 100,
        }

    def _temperature(self, handle: Any, which: str) -> float | None:
        smi = self._smi
        value = _number(
            _ask(
                lambda: smi.amdsmi_get_temp_metric(
                    handle,
                    smi.AmdSmiTemperatureType.HOTSPOT,
                    getattr(smi.AmdSmiTemperatureMetric, which),
                )
            )
        )
        # Degrees in current versions, thousandths of them in the first ones.
        return None if value is None else value / 1000 if value > 1000 else float(value)


def _pending_pages(pages: Any) -> int | None:
    """Return how many pages wait to be retired; a page says so by its status."""
    if not isinstance(pages, list):
        return None
    return sum("PENDING" in str(page.get("status", "")) for page in pages if isinstance(page, dict))


def _number(value: Any) -> int | None:
    """Return a number; amdsmi writes "N/A" for what a device does not tell."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _ask(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception:  # whatever one question meets, the others are still asked
        return None
