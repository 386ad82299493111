"""The collector's page in Prometheus' text format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainonce.fleet.collect.message import ACTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trainonce.fleet.collect.book import Book

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class _Family:
    name: str
    kind: str
    help: str
    samples: list[tuple[dict[str, str], float]] = field(default_factory=lambda: [])


# Field of a reading -> (metric, its type, what it is, further labels).
_DEVICE: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "temperature_c": ("temperature_celsius", "gauge", "Temperature of the device.", {}),
    "slowdown_c": ("slowdown_celsius", "gauge", "Where the device begins to protect itself.", {}),
    "shutdown_c": ("shutdown_celsius", "gauge", "Where the device switches off.", {}),
    "utilisation": ("utilization_ratio", "gauge", "Share of the time the device was busy.", {}),
    "energy_j": ("energy_joules_total", "counter", "Energy the device has used.", {}),
    "throttled_thermal_s": (
        "throttled_seconds_total", "counter", "Time slowed by the hardware.", {"by": "heat"},
    ),
    "throttled_brake_s": (
        "throttled_seconds_total", "counter", "Time slowed by the hardware.", {"by": "power_brake"},
    ),
    "recovery_action": (
        "recovery_action", "gauge", "What the driver advises; 0 is nothing.", {},
    ),
    "lost": ("lost", "gauge", "1 where the driver says that the device is gone.", {}),
    "row_remap_failed": (
        "row_remap_failed", "gauge", "Memory rows that could not be replaced.", {},
    ),
    "row_remap_pending": (
        "row_remap_pending", "gauge", "Memory rows that wait for a reset.", {},
    ),
    "ecc_uncorrected_total": (
        "memory_errors_total", "counter", "Memory errors.", {"corrected": "no"},
    ),
    "ecc_corrected_total": (
        "memory_errors_total", "counter", "Memory errors.", {"corrected": "yes"},
    ),
    "nvlink_errors_total": (
        "nvlink_errors_total", "counter", "Replays and recoveries of NVLink.", {},
    ),
    "pcie_replays_total": ("pcie_replays_total", "counter", "Replays of PCIe.", {}),
}  # fmt: skip
_HOST: dict[str, tuple[str, str, str]] = {
    "memory_free_share": ("memory_free_ratio", "gauge", "Free share of the host's memory."),
    "memory_stalled_share": (
        "memory_stalled_ratio", "gauge", "Share of a minute in which all waited for memory.",
    ),
    "disk_free_share": ("disk_free_ratio", "gauge", "Free share of the disk."),
    "link_downed_total": ("links_downed_total", "counter", "How often a network port went down."),
}  # fmt: skip
_JOB = {
    "step": ("committed_steps", "gauge", "Committed steps of the job."),
    "ranks": ("ranks", "gauge", "Ranks of the job that are alive."),
    "spares_ready": ("spares_ready", "gauge", "Spares that stand ready."),
    "incidents": ("incidents_total", "counter", "Incidents of the job."),
}


def render(book: Book) -> str:
    """Return the page: every host that was heard of lately, and what the collector itself does."""
    families: dict[str, _Family] = {}

    def add(name: str, kind: str, text: str, labels: Mapping[str, str], value: float) -> None:
        family = families.setdefault(name, _Family(f"trainonce_{name}", kind, text))
        family.samples.append((dict(labels), value))

    for entry in book.entries():
        host = {"host": entry.report.host}
        add("host_up", "gauge", "1 while the host's agent reports.", host, float(entry.is_fresh))
        add(
            "host_last_report_timestamp_seconds", "gauge", "When the host last reported.",
            host, entry.heard_wall_s,
        )  # fmt: skip
        if not entry.is_fresh:
            continue  # what it said has no meaning any more
        for reading in entry.report.readings:
            device = {**host, "device": reading.device}
            if not reading.device:
                for name, (metric, kind, text) in _HOST.items():
                    if (value := getattr(reading, name)) is not None:
                        add(f"host_{metric}", kind, text, host, value)
                continue
            for name, (metric, kind, text, more) in _DEVICE.items():
                if (value := getattr(reading, name)) is not None:
                    add(f"device_{metric}", kind, text, {**device, **more}, value)
        for verdict in entry.report.verdicts:
            add(
                "health_verdict", "gauge", "0 none, 1 note, 2 suspect, 3 migrate.",
                {**host, "device": verdict.device or "host"}, ACTIONS.index(verdict.action),
            )  # fmt: skip
        for job in entry.report.jobs:
            for name, (metric, kind, text) in _JOB.items():
                add(f"job_{metric}", kind, text, {**host, "job": job.job}, getattr(job, name))
    add("collector_reports_total", "counter", "Reports that were taken.", {}, book.num_taken)
    add("collector_hosts", "gauge", "Hosts that are known.", {}, len(book.entries()))
    for reason, number in book.rejected.items():
        add(
            "collector_rejected_total", "counter", "Requests that were refused.",
            {"reason": reason}, number,
        )  # fmt: skip
    return "".join(_family(family) for family in families.values())


def _family(family: _Family) -> str:
    lines = [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
    for labels, value in family.samples:
        lines.append(f"{family.name}{_labels(labels.items())} {float(value)!r}")
    return "\n".join(lines) + "\n"


def _labels(labels: Iterable[tuple[str, str]]) -> str:
    pairs = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
