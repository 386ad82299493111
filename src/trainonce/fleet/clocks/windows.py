"""Stamps of all hosts put on nearly equal clocks, and compared window by window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from trainonce.errors import ConfigError
from trainonce.fleet.clocks.edge import MIN_PAIRS, EdgeFit, Pairs, fit_edge
from trainonce.fleet.clocks.network import solve_potentials

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trainonce.fleet.clocks.record import ClockRecord

Edge = tuple[str, str]

_CODED_EPSILON_S = 1e-6
# A margin so much wider than an edge's best one means that hardly a packet found no queue; so much
# wider still, that none did, and that the middle between the bounds says nothing.
_POOR_MARGIN, _USELESS_MARGIN = 1.5, 3.0
# A window with fewer probes than this share of the usual is left out: the last one, mostly.
_MIN_SHARE = 0.5
# Every edge is doubted by this much besides its queueing.
_DOUBT_S = 25e-9
# A day of windows of one second. A record that lies about its times must not keep us for ever.
_MAX_WINDOWS = 100_000


@dataclass
class Window:
    """What one window says, at one instant of the reference.

    Args:
        centre_s: The instant, in seconds since the comparison's origin.
        offsets: [hosts], seconds less the reference on the nearly equal clocks; NaN: not known.
        skews: [hosts], seconds gained in a second.
        worst: [hosts], how far off an offset may be at worst.
        doubt: [hosts], how much queueing there may be in it.
        residuals: By edge, by how much its own offset disagrees.
    """

    centre_s: float
    offsets: NDArray[np.float64]
    skews: NDArray[np.float64]
    worst: NDArray[np.float64]
    doubt: NDArray[np.float64]
    residuals: dict[Edge, float]


class Comparison:
    """All clocks on nearly equal terms.

    Args:
        records: By host.
        hosts: In the order of all arrays.
        reference: The host whose clock the others are compared with.
    """

    def __init__(
        self, records: Mapping[str, ClockRecord], hosts: list[str], reference: str
    ) -> None:
        self._records, self.hosts, self.reference = records, hosts, reference
        self.index = {host: i for i, host in enumerate(hosts)}
        stamps = {(a, b): self._join(a, b) for a in hosts for b in hosts if a != b}
        self.edges = [
            (a, b)
            for a, b in stamps
            if a < b and min(len(stamps[a, b]), len(stamps[b, a])) >= MIN_PAIRS
        ]
        self.coarse = self._coarse_offsets(stamps)
        self.edges = [e for e in self.edges if e[0] in self.coarse and e[1] in self.coarse]
        near = [stamps[edge][:, 0].min() - self.coarse[edge[0]] for edge in self.edges]
        self.origin_ns = int(min(near, default=0))
        self._pairs = {
            edge: self._shifted(stamps[edge], *edge)
            for one in self.edges
            for edge in (one, (one[1], one[0]))
        }

    def _join(self, src: str, dst: str) -> NDArray[np.int64]:
        """[pairs, 4]: when the two left src and when they came to dst, where all is known."""
        sent = {(p, w): t for p, w, t in self._records[src].sent.get(dst, [])}
        came = {(p, w): t for p, w, t in self._records[dst].received.get(src, [])}
        rows = [
            (sent[p, 0], sent[p, 1], came[p, 0], came[p, 1])
            for p, w in sent
            if w == 0 and (p, 1) in sent and (p, 0) in came and (p, 1) in came
        ]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

    def _coarse_offsets(self, stamps: dict[Edge, NDArray[np.int64]]) -> dict[str, int]:
        """Each clock less the reference to about a millisecond, exact in integers however large."""
        apart: dict[str, list[tuple[str, int]]] = {}
        for a, b in self.edges:
            forth, back = stamps[a, b], stamps[b, a]
            upper = int((forth[:, 2] - forth[:, 0]).min())
            lower = -int((back[:, 2] - back[:, 0]).min())
            apart.setdefault(a, []).append((b, (upper + lower) // 2))
            apart.setdefault(b, []).append((a, -(upper + lower) // 2))
        coarse, todo = {self.reference: 0}, [self.reference]
        while todo:
            host = todo.pop()
            for other, offset in apart.get(host, []):
                if other not in coarse:
                    coarse[other] = coarse[host] + offset
                    todo.append(other)
        return coarse

    def _shifted(self, stamps: NDArray[np.int64], src: str, dst: str) -> Pairs:
        """Return stamps on clocks that nearly agree, in seconds since the origin."""
        sent = stamps[:, :2] - self.coarse[src] - self.origin_ns
        came = stamps[:, 2:] - self.coarse[dst] - self.origin_ns
        return Pairs(sent / 1e9, came / 1e9)

    def compare(self, window_s: float) -> list[Window]:
        """Compare the clocks in each window.

        Raises:
            ConfigError: There are too many windows.
        """
        probed = {
            int(k)
            for pairs in self._pairs.values()
            for k in np.unique(np.floor(pairs.tx_s[:, 0] / window_s))
        }
        if len(probed) > _MAX_WINDOWS:
            raise ConfigError(
                f"the probes span {len(probed)} windows, more than {_MAX_WINDOWS}",
                hint="compare shorter records, or with a longer --window-s",
            )
        starts = [k * window_s for k in sorted(probed)]
        fits = [
            {edge: self._fit(edge, begin_s, begin_s + window_s) for edge in self.edges}
            for begin_s in starts
        ]
        best: dict[Edge, float] = {}
        for window in fits:
            for edge, fit in window.items():
                if fit:
                    best[edge] = min(fit.margin_s, best.get(edge, fit.margin_s))
        points = [fit.num_points for window in fits for fit in window.values() if fit]
        usual = float(np.median(points)) if points else 0.0
        windows: list[Window] = []
        for begin_s, raw in zip(starts, fits, strict=True):
            good: dict[Edge, EdgeFit] = {}
            for edge, fit in raw.items():
                if fit is None or fit.num_points < _MIN_SHARE * usual:
                    continue
                if fit.margin_s > _POOR_MARGIN * best[edge]:
                    fit = self._fit(edge, begin_s, begin_s + window_s, coded=True) or fit
                if fit.margin_s <= _USELESS_MARGIN * best[edge]:
                    good[edge] = fit
            if good:
                windows.append(self._solve(good, best, begin_s + window_s / 2))
        return windows

    def _fit(
        self, edge: Edge, begin_s: float, end_s: float, *, coded: bool = False
    ) -> EdgeFit | None:
        """Fit one edge in one window of its first host's clock."""
        forth, back = self._pairs[edge], self._pairs[edge[1], edge[0]]
        forth = forth.select((forth.tx_s[:, 0] >= begin_s) & (forth.tx_s[:, 0] < end_s))
        back = back.select((back.rx_s[:, 0] >= begin_s) & (back.rx_s[:, 0] < end_s))
        if coded:
            forth, back = (each.select(each.coded(_CODED_EPSILON_S)) for each in (forth, back))
        return fit_edge(forth, back, (begin_s + end_s) / 2)

    def _solve(self, fits: dict[Edge, EdgeFit], best: dict[Edge, float], centre_s: float) -> Window:
        ends = np.array([[self.index[a], self.index[b]] for a, b in fits])
        n, root = len(self.hosts), self.index[self.reference]
        # A margin wider than the edge's best one holds queueing, of one direction or the other.
        doubt = np.array([fit.margin_s - best[edge] for edge, fit in fits.items()])
        doubt = np.maximum(doubt, 0.0)
        first = solve_potentials(
            ends, np.array([f.offset_s for f in fits.values()]), n, root, doubt=doubt
        )
        # The fits hold at one reading of their first host's clock each; go to one instant.
        at_once = np.array(
            [
                fit.at(centre_s + float(np.nan_to_num(first.values[a])))
                for fit, a in zip(fits.values(), ends[:, 0], strict=True)
            ]
        )
        offsets = solve_potentials(ends, at_once, n, root, doubt=doubt)
        skews = solve_potentials(ends, np.array([f.skew for f in fits.values()]), n, root)

        def along_best_path(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            graph = csr_matrix((weights, (ends[:, 0], ends[:, 1])), shape=(n, n))
            return dijkstra(graph, directed=False, indices=root)

        return Window(
            centre_s,
            offsets.values,
            skews.values,
            along_best_path(np.array([f.margin_s for f in fits.values()])),
            along_best_path(doubt + _DOUBT_S),
            dict(zip(fits, offsets.residuals.tolist(), strict=True)),
        )

    @property
    def num_loops(self) -> int:
        """Independent loops of hosts, around which offsets must add up to zero."""
        return len(self.edges) - (len(self.coarse) - 1)
