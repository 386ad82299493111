"""From readings to a decision: migrate now, suspect, or note.

The policy is pure: `judge` looks at the last readings of one device, which `trainonce.fleet.watch`
remembers, and returns what to do, with the reason. Few failures announce themselves (operators saw
two of ten before the driver did), so a warning saves little, and a false one costs a move. The
rules therefore ask for what the vendor calls fatal, or for what lasts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from trainonce.errors import ConfigError
from trainonce.fleet.heat import find_rise, least_next, unexplained_step
from trainonce.fleet.history import gained, latest, powers, temperatures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.fleet.signals import Reading


class Action(IntEnum):
    """What a verdict asks for; the larger, the more urgent."""

    NONE = 0
    NOTE = 1
    SUSPECT = 2
    MIGRATE = 3


@dataclass(frozen=True)
class Verdict:
    """What to do about a device, and why: the most urgent reason first."""

    action: Action
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HealthLimits:
    """What is too much.

    Args:
        window_s: How far back readings count.
        throttled_share: Share of the window slowed by hardware protection.
        hot_s: How long the slowdown temperature must last.
        ramp_ahead_s: A rise that reaches shutdown within this is a reason to move.
        ramp_near_c: Only from so many degrees below slowdown on; a warm-up ends below it.
        corrected_ecc_per_h: Corrected memory errors an hour.
        link_errors_per_h: NVLink errors or PCIe replays an hour.
        free_share: Free host memory or disk below which it is noted.
        memory_stalled_share: Share of a minute in which all waited for memory that is noted.
    """

    window_s: float = 600.0
    throttled_share: float = 0.6
    hot_s: float = 60.0
    ramp_ahead_s: float = 300.0
    ramp_near_c: float = 5.0
    corrected_ecc_per_h: float = 1000.0
    link_errors_per_h: float = 100.0
    free_share: float = 0.02
    memory_stalled_share: float = 0.2

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{item.name} must be more than 0, not {value!r}")


# NVIDIA's "XID Errors" document: what needs a reset or worse, what hints at hardware, and what a
# program's own fault shows as.
XIDS_FATAL = frozenset({48, 62, 64, 79, 95, 119, 120, 136, 140, 143})
XIDS_SUSPECT = frozenset({61, 63, 74, 92, 94, 109, 121, 137, 154})

_RECOVERY = {
    1: "reset the GPU",
    2: "reboot the node",
    3: "drain it",
    4: "drain and reset it",
    5: "recover the IMEX domain",
    6: "reset the bus",
    7: "reboot the system",
}
# By the names that the kernel log's source gives them. An unknown name counts for nothing.
_KERNEL_FAULTS = {
    "gpu_lost": (Action.MIGRATE, "the kernel says that the GPU fell off the bus"),
    "gpu_reset": (Action.SUSPECT, "the kernel has reset the GPU"),
    "gpu_memory": (Action.SUSPECT, "the kernel tells of GPU memory errors"),
    "machine_check": (Action.SUSPECT, "the processor reported a hardware error"),
    "host_memory": (Action.SUSPECT, "the host's memory had an error that was not corrected"),
    "pcie_fatal": (Action.SUSPECT, "a PCIe device reported an error that was not corrected"),
    "link_down": (Action.NOTE, "a network port went down"),
    "disk": (Action.NOTE, "a disk reported an error"),
    "out_of_memory": (Action.NOTE, "the kernel killed a process for memory"),
}
# So fast a device warms up with work, too, and to anywhere below slowdown.
_WARM_UP_C_PER_MIN = 8.0
# What is carried forward by whole degrees may fall short by one.
_ROUNDING_C = 1.0
# A rate needs some time to be one.
_MIN_RATE_S = 60.0

_Finding = tuple[Action, str]


def judge(history: Sequence[Reading], limits: HealthLimits | None = None) -> Verdict:
    """Judge one device by its last readings.

    Args:
        history: Of one device, oldest first. Readings older than the window do not count.
        limits: What is too much.
    """
    limits = limits or HealthLimits()
    if not history:
        return Verdict(Action.NONE)
    now_s = history[-1].mono_s
    recent = [reading for reading in history if now_s - reading.mono_s <= limits.window_s]
    found = [finding for rule in _RULES for finding in rule(recent, limits)]
    found.sort(key=lambda finding: -finding[0])
    action = found[0][0] if found else Action.NONE
    return Verdict(action, tuple(reason for _, reason in found))


def _vendor_advice(recent: Sequence[Reading], _: HealthLimits) -> list[_Finding]:
    found: list[_Finding] = []
    if latest(recent, "lost"):
        found.append((Action.MIGRATE, "the driver has lost the device"))
    if action := latest(recent, "recovery_action"):
        advice = _RECOVERY.get(action, f"action {action}")
        found.append((Action.MIGRATE, f"the driver advises to {advice}"))
    if rows := latest(recent, "row_remap_failed"):
        found.append((Action.MIGRATE, f"{rows} memory rows could not be remapped"))
    if rows := latest(recent, "row_remap_pending"):
        found.append((Action.SUSPECT, f"{rows} memory rows wait for a reset"))
    return found


def _driver_events(recent: Sequence[Reading], _: HealthLimits) -> list[_Finding]:
    found: list[_Finding] = []
    for xid in sorted({xid for reading in recent for xid in reading.xids}):
        if xid in XIDS_FATAL:
            found.append((Action.MIGRATE, f"XID {xid}: the GPU needs a reset"))
        elif xid in XIDS_SUSPECT:
            found.append((Action.SUSPECT, f"XID {xid} hints at the hardware"))
        else:
            found.append((Action.NOTE, f"XID {xid} is a program's fault as a rule"))
    return found


def _kernel_faults(recent: Sequence[Reading], _: HealthLimits) -> list[_Finding]:
    seen = {name for reading in recent for name in reading.kernel_faults}
    return [_KERNEL_FAULTS[name] for name in sorted(seen & set(_KERNEL_FAULTS))]


def _counters(recent: Sequence[Reading], limits: HealthLimits) -> list[_Finding]:
    found: list[_Finding] = []
    uncorrected, _ = gained(recent, "ecc_uncorrected_total")
    if uncorrected:
        found.append((Action.SUSPECT, f"{uncorrected:.0f} memory errors could not be corrected"))
    downed, _ = gained(recent, "link_downed_total")
    if downed:
        found.append((Action.SUSPECT, f"a network port went down {downed:.0f} times"))
    for name, limit, what in (
        ("ecc_corrected_total", limits.corrected_ecc_per_h, "corrected memory errors"),
        ("nvlink_errors_total", limits.link_errors_per_h, "NVLink errors"),
        ("pcie_replays_total", limits.link_errors_per_h, "PCIe replays"),
    ):
        errors, over_s = gained(recent, name)
        per_h = errors / over_s * 3600 if over_s >= _MIN_RATE_S else 0.0
        if per_h > limit:
            found.append((Action.SUSPECT, f"{per_h:.0f} {what} an hour, limit {limit:.0f}"))
    return found


def _throttling(recent: Sequence[Reading], limits: HealthLimits) -> list[_Finding]:
    found: list[_Finding] = []
    for name, what in (
        ("throttled_thermal_s", "thermal protection"),
        ("throttled_brake_s", "the power brake"),
    ):
        slowed_s, over_s = gained(recent, name)
        # Of the whole window, not of what was seen of it: a minute after the start says little.
        share = slowed_s / max(over_s, limits.window_s)
        if share >= limits.throttled_share:
            found.append((Action.SUSPECT, f"slowed by {what} {share:.0%} of {over_s:.0f} s"))
    return found


def _temperature(recent: Sequence[Reading], limits: HealthLimits) -> list[_Finding]:
    """Too hot for a while, or rising steadily towards shutdown."""
    slowdown_c, shutdown_c = latest(recent, "slowdown_c"), latest(recent, "shutdown_c")
    times, degrees = temperatures(recent)
    if not len(times) or slowdown_c is None:
        return []
    now_c = float(np.median(degrees[-3:]))  # one wrong reading is no heat
    lasting = degrees[times > times[-1] - limits.hot_s]
    hot = lasting.min() >= slowdown_c and times[-1] - times[0] >= limits.hot_s
    found: list[_Finding] = []
    if hot:
        reason = f"{lasting.min():.0f} °C or more for {limits.hot_s:.0f} s"
        found.append((Action.SUSPECT, f"{reason}, slowdown at {slowdown_c:.0f} °C"))
    if shutdown_c is None:
        return found
    soon = least_next(times, degrees)
    # What still answers is below its shutdown: two wrong readings in a row are no rise.
    lives = soon is not None and max(soon[0], degrees[-1]) < shutdown_c + _ROUNDING_C
    if soon and lives and soon[0] >= slowdown_c and soon[1] >= shutdown_c - _ROUNDING_C:
        reason = f"{soon[0]:.0f} °C, and {soon[1]:.0f} °C at the next reading"
        found.append((Action.MIGRATE, f"{reason}: shutdown at {shutdown_c:.0f} °C is near"))
        return found
    step = unexplained_step(*powers(recent))
    # At this pace the reading after the next would find it off.
    if step and step[0] < shutdown_c + _ROUNDING_C and step[0] + 2 * step[1] >= shutdown_c:
        reason = f"{step[0]:.0f} °C, {step[1]:.0f} °C more than before at no more power"
        found.append((Action.MIGRATE, f"{reason}: shutdown at {shutdown_c:.0f} °C is near"))
        return found
    if now_c < slowdown_c - limits.ramp_near_c:
        return found
    rise = find_rise(times, degrees)
    per_min = rise.per_s() * 60 if rise else 0.0
    if per_min > _WARM_UP_C_PER_MIN and now_c < slowdown_c:
        return found
    if rise and rise.heads_for(limits.ramp_ahead_s) >= shutdown_c:
        reason = f"{now_c:.0f} °C and rising {per_min:.1f} °C a minute"
        found.append((Action.MIGRATE, f"{reason}: shutdown at {shutdown_c:.0f} °C is near"))
    return found


def _host_space(recent: Sequence[Reading], limits: HealthLimits) -> list[_Finding]:
    found: list[_Finding] = []
    for what in ("memory", "disk"):
        share = latest(recent, f"{what}_free_share")
        if share is not None and share < limits.free_share:
            found.append((Action.NOTE, f"{share:.1%} of the host's {what} is free"))
    stalled = latest(recent, "memory_stalled_share") or 0.0
    if stalled > limits.memory_stalled_share:
        found.append((Action.NOTE, f"all processes waited for memory {stalled:.0%} of a minute"))
    return found


_RULES: tuple[Callable[[Sequence[Reading], HealthLimits], list[_Finding]], ...] = (
    _vendor_advice,
    _driver_events,
    _kernel_faults,
    _temperature,
    _throttling,
    _counters,
    _host_space,
)
