"""The last readings of every device, for as long as they count, and what they say."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from trainonce.fleet.health import HealthLimits, judge
from trainonce.fleet.heat import next_look_s
from trainonce.fleet.history import latest, since, temperatures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.fleet.health import Verdict
    from trainonce.fleet.signals import Reading

# Of a device's readings, so many of the usual intervals tell how soon to read again.
_LOOKED_AT = 4
# Of one device, whatever it sends: ten minutes of three readings a second.
_MAX_READINGS = 2000
# So often in a row nothing but old readings: the clock was set back.
_SET_BACK = 3


class HealthWatch:
    """Remembers the readings of every device, as long as they count.

    Args:
        limits: What is too much.
    """

    def __init__(self, limits: HealthLimits | None = None) -> None:
        self._limits = limits or HealthLimits()
        self._history: dict[tuple[str, str], deque[Reading]] = {}
        self._late: dict[tuple[str, str], list[Sequence[Reading]]] = {}

    def observe(self, readings: Sequence[Reading]) -> dict[tuple[str, str], Verdict]:
        """Take readings in; return the verdict on each device read, by (host, device).

        A reading older than the last one of its device is dropped: it came late. Where nothing
        else comes of a device three times in a row, its clock was set back, or one reading was
        far ahead of it: what was before is forgotten.
        """
        by_device: dict[tuple[str, str], list[Reading]] = {}
        for reading in readings:
            by_device.setdefault((reading.host, reading.device), []).append(reading)
        verdicts: dict[tuple[str, str], Verdict] = {}
        for key, told in by_device.items():
            history = self._history.setdefault(key, deque(maxlen=_MAX_READINGS))
            if self._append(key, history, told):
                while history[-1].mono_s - history[0].mono_s > self._limits.window_s:
                    history.popleft()
                verdicts[key] = judge(list(history), self._limits)
        return verdicts

    def _append(
        self, key: tuple[str, str], history: deque[Reading], told: Sequence[Reading]
    ) -> bool:
        """Add what is in order; tell whether anything was."""
        if _extend(history, told):
            self._late.pop(key, None)
            return True
        late = self._late.setdefault(key, [])
        late.append(told)
        if len(late) < _SET_BACK:
            return False
        history.clear()
        for each in self._late.pop(key):
            _extend(history, each)
        return True

    def next_look_s(self, every_s: float) -> float:
        """Return in how many seconds to read again, `every_s` at most.

        Sooner where a temperature rises towards a limit of its device, so that a steep rise is seen
        in time.
        """
        newest_s: dict[str, float] = {}
        for (host, _), history in self._history.items():
            newest_s[host] = max(newest_s.get(host, 0.0), history[-1].mono_s)
        soonest_s = every_s
        for (host, _), history in self._history.items():
            recent = since(history, newest_s[host] - _LOOKED_AT * every_s)
            times, degrees = temperatures(recent)
            if not len(times) or times[-1] < newest_s[host] - every_s:
                continue  # it has fallen silent
            limits = [latest(recent, name) for name in ("slowdown_c", "shutdown_c")]
            for limit_c in limits:
                if limit_c is not None and limit_c > degrees[-1]:
                    soonest_s = min(soonest_s, next_look_s(times, degrees, limit_c, every_s))
        return soonest_s


def _extend(history: deque[Reading], told: Sequence[Reading]) -> bool:
    added = False
    for reading in told:
        if not history or reading.mono_s >= history[-1].mono_s:
            history.append(reading)
            added = True
    return added
