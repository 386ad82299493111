"""Where a rise of temperature leads to: to a rest, or to where a device cannot live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A rise needs some readings to be told, and some height: a sensor at rest wavers by a degree or
# two.
_MIN_RISE_READINGS = 6
_MIN_RISE_C = 4.0
_REST_SHARE = 0.1  # of its height
# So many readings within so many degrees at the same power to a tenth are a rest.
_AT_REST, _REST_C, _SAME_POWER = 5, 3.0, 0.1
# How fast curves come to rest; the last is a straight line.
_TAUS_S = (15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1e6)
_ROUNDING_C = 0.4  # of a sensor that tells whole degrees
_JUST_NOW_S = 60.0
# A rise is read so often on its way to a limit, whatever its slope; at most once a second.
_LOOKS = 8
_SOONEST_S = 1.0


@dataclass(frozen=True)
class Rise:
    """A rise of temperature, from its foot on: [readings] each."""

    times: NDArray[np.float64]
    degrees: NDArray[np.float64]

    def per_s(self, lately_s: float = 120.0) -> float:
        """Return degrees a second, lately."""
        late = self.times >= self.times[-1] - lately_s
        return _line(self.times[late], self.degrees[late])[0]

    def heads_for(self, ahead_s: float) -> float:
        """Return the least temperature to which it may lead within `ahead_s`.

        A device that is given work nears a rest, ever more slowly; one that has lost its cooling
        goes on to where it cannot live. So curves that come to rest, and a line, are fitted, and
        those count that fit about as well as the best. So does the last minute: no curve fits a
        rise that has just ended.
        """
        since_s = self.times - self.times[0]
        curves: list[tuple[float, float]] = []
        for tau_s in _TAUS_S:
            gone = np.exp(-np.append(since_s, since_s[-1] + ahead_s) / tau_s)
            slope, rest = _line(gone[:-1], self.degrees)
            off = self.degrees - rest - slope * gone[:-1]
            curves.append((float(np.sqrt(np.mean(off**2))), rest + slope * float(gone[-1])))
        plausible = max(_ROUNDING_C, 1.1 * min(off for off, _ in curves))
        just_now_c = float(self.degrees[-1]) + self.per_s(_JUST_NOW_S) * ahead_s
        return min(just_now_c, *(end_c for off, end_c in curves if off <= plausible))


def next_look_s(
    times: NDArray[np.float64], degrees: NDArray[np.float64], limit_c: float, every_s: float
) -> float:
    """Return in how many seconds to read again, `every_s` at most: the sooner, the steeper a rise.

    Args:
        times: Of the last readings, seconds: [readings].
        degrees: What they showed: [readings].
        limit_c: Where the rise must not arrive unseen.
        every_s: Time between two readings where nothing rises.
    """
    late = times >= times[-1] - 2 * every_s
    per_s = _line(times[late], degrees[late])[0]
    below_c = limit_c - float(degrees[-1])
    if per_s <= 0 or below_c <= 0:
        return every_s
    return max(min(_SOONEST_S, every_s), min(every_s, below_c / per_s / _LOOKS))


def least_next(
    times: NDArray[np.float64], degrees: NDArray[np.float64]
) -> tuple[float, float] | None:
    """Return the least temperature now and at the next reading, by the last three that differ.

    For rises so steep, or readings so rare, that there are too few to fit a curve. The slower of
    the last two steps is repeated, so that one wrong reading shows no rise, and a rise that comes
    to rest is not carried beyond its rest: its steps shrink. None where nothing rises any more.
    """
    changed = np.flatnonzero(np.diff(degrees, prepend=np.nan) != 0)[-3:]
    if len(changed) < 3 or times[-1] - times[changed[2]] > times[changed[2]] - times[changed[1]]:
        return None
    first, second, third = degrees[changed]
    step = min(second - first, third - second)
    return (float(first + 2 * step), float(first + 3 * step)) if step > 0 else None


def unexplained_step(
    degrees: NDArray[np.float64], watts: NDArray[np.float64]
) -> tuple[float, float] | None:
    """Return the last temperature and its last step, where a device rises at no more power.

    What has come to rest at some power stays there, as long as it is cooled. So a rise from there
    needs no long look; two readings of it, since one may be wrong.

    Args:
        degrees: Of the last readings: [readings].
        watts: Mean power up to each of them: [readings].
    """
    for lately in (2, 3, 4):
        rest, rest_w = degrees[-lately - _AT_REST : -lately], watts[-lately - _AT_REST : -lately]
        if len(rest) < _AT_REST:
            break
        rise, usual_w = degrees[-lately:], float(np.median(rest_w))
        same = np.abs(rest_w - usual_w).max() <= _SAME_POWER * usual_w
        no_more = watts[-lately:].max() <= (1 + _SAME_POWER) * usual_w
        above = rise - rest.max()
        rises = np.diff(rise).min() > 0 and above[0] >= _MIN_RISE_C / 2 and above[-1] >= _MIN_RISE_C
        if same and no_more and np.ptp(rest) <= _REST_C and rises:
            return float(rise[-1]), float(rise[-1] - rise[-2])
    return None


def find_rise(times: NDArray[np.float64], degrees: NDArray[np.float64]) -> Rise | None:
    """Return the rise that still goes on; None where it is too short to tell one."""
    if len(times) < _MIN_RISE_READINGS:
        return None
    # The median of three readings: one that is wrong is no heat, and no foot.
    smooth = np.median([degrees[:-2], degrees[1:-1], degrees[2:]], axis=0)
    height = smooth[-1] - smooth.min()
    # What wavers at rest is no part of the rise: no curve fits both.
    foot = int(np.flatnonzero(smooth <= smooth.min() + max(1.0, _REST_SHARE * height))[-1])
    if len(smooth) - foot < _MIN_RISE_READINGS or height < _MIN_RISE_C:
        return None
    return Rise(times[1:-1][foot:], smooth[foot:])


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Return slope and level of the line through points; a slope of 0 where all are at one x."""
    apart = x - x.mean()
    spread = float(apart @ apart)
    slope = float(apart @ y) / spread if spread > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())
