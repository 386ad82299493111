"""The offset between two clocks, from probes both ways.

After Huygens (Geng et al., "Exploiting a Natural Network Effect for Scalable, Fine-grained Clock
Synchronization", NSDI 2018). A probe from A to B shows B's clock less A's plus its delay, which
bounds the offset from above; a probe from B to A bounds it from below. The offset over a window is
the straight line that separates the two clouds with the widest margin: packets that queued lie far
from it and do not matter, whatever the load, as long as a few did not queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, hstack, identity

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Share of points that may lie on the wrong side of the margin.
_NU = 0.05
MIN_PAIRS = 4
_MICROSECOND = 1e-6


@dataclass(frozen=True)
class Pairs:
    """Probe pairs from one host to another, sent back to back; seconds.

    Args:
        tx_s: [pairs, 2] on the sender's clock.
        rx_s: [pairs, 2] on the receiver's clock.
    """

    tx_s: NDArray[np.float64]
    rx_s: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.tx_s)

    def select(self, chosen: NDArray[np.bool_]) -> Pairs:
        """Return some of the pairs."""
        return Pairs(self.tx_s[chosen], self.rx_s[chosen])

    def coded(self, epsilon_s: float) -> NDArray[np.bool_]:
        """[pairs], True where the two arrived as far apart as they were sent.

        Then neither queued, or both as long, which is rare.
        """
        spread = np.diff(self.rx_s, axis=1) - np.diff(self.tx_s, axis=1)
        return np.abs(spread[:, 0]) < epsilon_s


@dataclass(frozen=True)
class EdgeFit:
    """B's clock less A's, as a line over A's clock.

    Args:
        offset_s: At `centre_s`.
        skew: Seconds a second.
        centre_s: On A's clock.
        margin_s: Half the gap between the two bounds: about the delay one way. However
            different the ways there and back are, the offset is off by no more than this.
        num_points: Probes behind it.
    """

    offset_s: float
    skew: float
    centre_s: float
    margin_s: float
    num_points: int

    def at(self, time_s: float) -> float:
        """Offset at `time_s` of A's clock."""
        return self.offset_s + self.skew * (time_s - self.centre_s)


def fit_edge(forth: Pairs, back: Pairs, centre_s: float) -> EdgeFit | None:
    """Fit the line between the bounds.

    Args:
        forth: From A to B.
        back: From B to A.
        centre_s: On A's clock; near the probes.

    Returns:
        None where there are too few pairs, or no line separates them: a clock jumped.
    """
    if len(forth) < MIN_PAIRS or len(back) < MIN_PAIRS:
        return None
    times = np.concatenate([forth.tx_s.ravel(), back.rx_s.ravel()]) - centre_s
    upper = (forth.rx_s - forth.tx_s).ravel()
    lower = (back.tx_s - back.rx_s).ravel()
    middle = (upper.min() + lower.max()) / 2
    values = (np.concatenate([upper, lower]) - middle) / _MICROSECOND
    side = np.repeat([1.0, -1.0], [len(upper), len(lower)])
    line = _separate(times, values, side)
    if line is None:
        return None
    slope, level, margin = line
    if margin <= 0:
        return None
    return EdgeFit(
        offset_s=level * _MICROSECOND + middle,
        skew=slope * _MICROSECOND,
        centre_s=centre_s,
        margin_s=margin * _MICROSECOND,
        num_points=len(values),
    )


def _separate(
    x: NDArray[np.float64], y: NDArray[np.float64], side: NDArray[np.float64]
) -> tuple[float, float, float] | None:
    """Solve the nu-SVM in its linear form for a line y = a x + b.

    maximise m - sum(xi) / (nu n) subject to side (y - a x - b) >= m - xi, xi >= 0. Vertical
    distance is what is wanted here, so the margin is not divided by the line's norm and the
    problem stays linear. nu must not exceed twice the smaller class's share, or it is unbounded.
    """
    n = len(x)
    nu = min(_NU, 1.8 * min((side > 0).sum(), (side < 0).sum()) / n)
    columns = csr_matrix(np.column_stack([side * x, side, np.ones(n)]))
    done = linprog(
        np.concatenate([[0.0, 0.0, -1.0], np.full(n, 1 / (nu * n))]),
        A_ub=csr_matrix(hstack([columns, -identity(n)])),
        b_ub=side * y,
        bounds=[(None, None)] * 3 + [(0, None)] * n,
        method="highs",
    )
    if done.x is None:
        return None
    return float(done.x[0]), float(done.x[1]), float(done.x[2])
