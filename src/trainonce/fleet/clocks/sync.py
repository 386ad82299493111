"""All clocks of a network against one of them, from the records of all hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trainonce.errors import ConfigError
from trainonce.fleet.clocks.windows import Comparison

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trainonce.fleet.clocks.record import ClockRecord
    from trainonce.fleet.clocks.windows import Window

# Windows on each side that a clock's rate is taken as constant over.
_SMOOTH = 2
# An error bound is so many robust standard deviations, and no less than stamps can be trusted.
_BOUND_SIGMAS = 4.0
_FLOOR_S = 250e-9
# Ways that should be equally long differ a little all the same, and no statistics show it.
_UNEVEN = 0.1
_ALARM_SIGMAS, _ALARM_FLOOR_S = 6.0, 0.5e-6
_JUMP_BOUNDS, _JUMP_FLOOR_S = 20.0, 100e-6


@dataclass(frozen=True, kw_only=True)
class HostClock:
    """One clock less the reference.

    Args:
        offset_s: At `at_s`.
        bound_s: Off by no more than this, where ways there and back are equally long to a tenth.
        worst_s: Off by no more than this, however different they are.
        skew: Seconds by which it gains on the reference in a second.
        at_s: On the reference's clock, seconds since the epoch.
        history: (seconds since the epoch, offset) of each window.
        jumps: (seconds since the epoch, by how much), where it was set.
    """

    offset_s: float
    bound_s: float
    worst_s: float
    skew: float
    at_s: float
    history: list[tuple[float, float]] = field(default_factory=lambda: [])
    jumps: list[tuple[float, float]] = field(default_factory=lambda: [])


@dataclass(frozen=True, kw_only=True)
class Asymmetry:
    """A pair of hosts whose offset disagrees with everyone else's: one way is longer.

    Args:
        a: One host.
        b: The other.
        longer_s: By how much the way from a to b takes longer than the way back.
    """

    a: str
    b: str
    longer_s: float


@dataclass(frozen=True, kw_only=True)
class ClockReport:
    """The clocks of all hosts.

    Args:
        reference: The host whose clock the others are compared with.
        clocks: By host; those that could not be compared are missing.
        asymmetries: Pairs with ways of different length.
        stamps: "kernel", or "user" where any host's were taken in user space.
        num_windows: Windows in which clocks were compared.
        notes: What limits the answer, in words.
    """

    reference: str
    clocks: dict[str, HostClock]
    asymmetries: list[Asymmetry]
    stamps: str
    num_windows: int
    notes: list[str]


def synchronise(
    records: Sequence[ClockRecord], *, reference: str | None = None, window_s: float = 2.0
) -> ClockReport:
    """Compare all clocks with the reference's.

    Args:
        records: One of each host.
        reference: A host; the first by address if not given.
        window_s: Over how long a clock's rate is taken as constant.

    Raises:
        ConfigError: Records are missing or doubled, or no two hosts could be compared.
    """
    by_host = {record.host: record for record in records}
    if len(by_host) < len(records) or len(records) < 2:
        raise ConfigError(
            f"{len(records)} records of {len(by_host)} hosts: one of each of two or more is needed",
            hint="run `trainonce fleet clock-probe` on every host at the same time",
        )
    if not 0.1 <= window_s <= 600:
        raise ConfigError(f"a window must last 0.1 to 600 s, not {window_s}")
    hosts = sorted(by_host)
    reference = reference or hosts[0]
    if reference not in by_host:
        raise ConfigError(f"no record of the reference {reference}", hint=f"one of {hosts}")
    comparison = Comparison(by_host, hosts, reference)
    windows = comparison.compare(window_s)
    if not windows:
        raise ConfigError(
            "no two clocks could be compared: too few probes came through both ways",
            hint="probe for longer than a window, and look at what each host reports",
        )
    return _Reporter(comparison, by_host, windows, window_s).report()


class _Reporter:
    """What the windows say together."""

    def __init__(
        self,
        comparison: Comparison,
        by_host: dict[str, ClockRecord],
        windows: list[Window],
        window_s: float,
    ) -> None:
        self._compared, self._by_host = comparison, by_host
        self._windows, self._window_s = windows, window_s
        users = [host for host, record in by_host.items() if record.stamps == "user"]
        self._users, self._stamps = users, "user" if users else "kernel"
        self._loops = self._loop_sigma()

    def report(self) -> ClockReport:
        """Put the windows together."""
        clocks: dict[str, HostClock] = {}
        for host, i in self._compared.index.items():
            seen = [w for w in self._windows if not np.isnan(w.offsets[i])]
            if seen:
                clocks[host] = self._clock(host, i, seen)
        return ClockReport(
            reference=self._compared.reference,
            clocks=clocks,
            asymmetries=self._asymmetries(),
            stamps=self._stamps,
            num_windows=len(self._windows),
            notes=self._notes(clocks),
        )

    def _loop_sigma(self) -> float | None:
        """Standard deviation of an edge's error, from what loops do not add up to."""
        free = self._compared.num_loops
        residuals = [abs(r) for w in self._windows for r in w.residuals.values()]
        if free < 1 or not residuals:
            return None
        spread = (len(self._compared.edges) / free) ** 0.5
        return 1.4826 * float(np.median(residuals)) * spread

    def _clock(self, host: str, i: int, seen: list[Window]) -> HostClock:
        epoch_s = self._compared.origin_ns / 1e9
        base_s = self._compared.coarse[host] / 1e9
        if host == self._compared.reference:
            at_s = epoch_s + seen[-1].centre_s
            return HostClock(offset_s=0.0, bound_s=0.0, worst_s=0.0, skew=0.0, at_s=at_s)
        times = np.array([w.centre_s for w in seen])
        offsets = np.array([w.offsets[i] for w in seen])
        skews = np.array([w.skews[i] for w in seen])
        worst = seen[-1].worst[i]
        # How far each window is from where the one before pointed to: its error, and a jump.
        steps = np.diff(offsets) - np.diff(times) * (skews[1:] + skews[:-1]) / 2
        bound = self._bound_s(offsets, worst)
        jumped = np.abs(steps) > max(_JUMP_FLOOR_S, _JUMP_BOUNDS * bound)
        offsets = _smooth(times, offsets, np.array([w.doubt[i] for w in seen]), jumped)
        since = int(np.flatnonzero(jumped)[-1]) + 1 if jumped.any() else 0
        return HostClock(
            offset_s=base_s + float(offsets[-1]),
            bound_s=float(bound),
            worst_s=float(worst),
            skew=_slope(times[since:], offsets[since:], float(skews[-1])),
            at_s=epoch_s + float(times[-1]),
            history=[
                (epoch_s + float(t), base_s + float(x)) for t, x in zip(times, offsets, strict=True)
            ],
            jumps=[
                (epoch_s + float(times[k + 1]) - self._window_s / 2, float(steps[k]))
                for k in np.flatnonzero(jumped)
            ],
        )

    def _bound_s(self, offsets: NDArray[np.float64], worst: float) -> float:
        """How far off an offset may be, if the ways there and back are equally long."""
        sigmas = [s for s in (self._loops, _scatter(offsets)) if s is not None]
        if self._users or not sigmas:
            return worst  # the scheduler delays arrivals more than departures
        return min(worst, max(_FLOOR_S, _UNEVEN * worst, _BOUND_SIGMAS * max(sigmas)))

    def _asymmetries(self) -> list[Asymmetry]:
        if self._loops is None:
            return []
        limit_s = max(_ALARM_FLOOR_S, _ALARM_SIGMAS * self._loops)
        alarms: list[Asymmetry] = []
        for a, b in self._compared.edges:
            off = [w.residuals[a, b] for w in self._windows if (a, b) in w.residuals]
            # The pair's own offset is off by half of what one way is longer.
            if off and abs(np.median(off)) > limit_s:
                alarms.append(Asymmetry(a=a, b=b, longer_s=2 * float(np.median(off))))
        return sorted(alarms, key=lambda alarm: -abs(alarm.longer_s))

    def _notes(self, clocks: dict[str, HostClock]) -> list[str]:
        notes: list[str] = []
        lost = [host for host in self._compared.hosts if host not in clocks]
        if lost:
            notes.append(f"not compared, too few probes both ways: {', '.join(lost)}")
        if self._users:
            notes.append(
                f"stamps from user space on {', '.join(self._users)}: the kernel gave none, so "
                "offsets are good to some microseconds only"
            )
        if self._compared.num_loops < 1:
            notes.append("no loop of hosts: ways of different length cannot be told from offsets")
        if len(self._windows) < 3:
            notes.append("fewer than 3 windows: bounds are the widest possible")
        for record in self._by_host.values():
            if record.unreachable:
                notes.append(f"{record.host} never heard {', '.join(record.unreachable)}")
            if record.strangers:
                notes.append(f"{record.host} dropped {record.strangers} packets of strangers")
        return notes


def _scatter(offsets: NDArray[np.float64]) -> float | None:
    """Standard deviation of a window's error, from how three in a row miss a straight line."""
    if len(offsets) < 3:
        return None
    bent = offsets[2:] - 2 * offsets[1:-1] + offsets[:-2]
    return 1.4826 * float(np.median(np.abs(bent))) / 6**0.5


def _smooth(
    times: NDArray[np.float64],
    offsets: NDArray[np.float64],
    doubt: NDArray[np.float64],
    jumped: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Fit a line through each window and its neighbours, those of little doubt first.

    A clock's rate hardly changes within some windows, but the load may leave one of them with few
    packets that found no queue. No line goes across a jump.
    """
    part = np.concatenate([[0], np.cumsum(jumped)])
    smooth = offsets.copy()
    for k, time_s in enumerate(times):
        near = (np.abs(np.arange(len(times)) - k) <= _SMOOTH) & (part == part[k])
        if near.sum() > 2:
            line = np.polyfit(times[near] - time_s, offsets[near], 1, w=1 / doubt[near])
            smooth[k] = line[1]
    return smooth


def _slope(times: NDArray[np.float64], offsets: NDArray[np.float64], single: float) -> float:
    """Skew over the last windows, at most ten: the drift changes with temperature."""
    if len(times) < 2:
        return single
    return float(np.polyfit(times[-10:], offsets[-10:], 1)[0])
