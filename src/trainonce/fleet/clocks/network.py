"""One offset for each clock, from the offsets of many pairs: the network effect.

Offsets around a loop add up to zero, so what they add up to instead is error, and spreading it by
least squares averages it out. A path that is longer in one direction shifts its pair by half the
difference; robust weights keep such pairs from spoiling the others, and show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import lsqr

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDS, _ABSOLUTE_ROUNDS = 24, 14
_TUKEY = 4.685


@dataclass(frozen=True)
class Potentials:
    """One value for each node, whose differences fit the edges best.

    Args:
        values: [nodes]; 0 at the reference, NaN where nothing connects a node to it.
        residuals: [edges], measured less fitted.
        sigma: Robust standard deviation of the residuals.
    """

    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    sigma: float


def solve_potentials(
    edges: NDArray[np.int64],
    measured: NDArray[np.float64],
    num_nodes: int,
    reference: int = 0,
    *,
    doubt: NDArray[np.float64] | None = None,
    floor: float = 20e-9,
) -> Potentials:
    """Fit `values[b] - values[a]` to `measured` for every edge (a, b).

    First by least absolute residuals, which a single bad edge among six does not spoil, then with
    Tukey's weights, which give edges that are far off no say at all and average the others.

    Args:
        edges: [edges, 2].
        measured: [edges].
        num_nodes: How many nodes there are.
        reference: The node whose value is 0.
        doubt: [edges], how far off each may be for reasons of its own; such edges count less.
        floor: Residuals below this are not told apart: 20 ns, or 20 ppb of skew.
    """
    n = len(edges)
    rows = np.repeat(np.arange(n), 2)
    ends = np.tile([-1.0, 1.0], n)
    difference = csr_matrix((ends, (rows, edges.ravel())), shape=(n, num_nodes))
    trust = np.ones(n) if doubt is None else floor / (floor + doubt)
    weights = np.ones(n)
    values, residuals, sigma = np.zeros(num_nodes), measured, 0.0
    for turn in range(_ROUNDS):
        root = np.sqrt(weights) * trust
        scaled = csr_matrix(difference.multiply(root[:, None]))
        values = lsqr(scaled, measured * root, atol=1e-13, btol=1e-13)[0]
        residuals = measured - difference @ values
        sigma = 1.4826 * float(np.median(np.abs(residuals))) if n else 0.0
        off = np.abs(residuals) * trust / max(sigma, floor)
        if turn < _ABSOLUTE_ROUNDS:
            weights = floor / np.maximum(floor, np.abs(residuals) * trust)
        else:
            # Never quite zero: a node must not fall out of the system.
            weights = np.where(off < _TUKEY, (1 - (off / _TUKEY) ** 2) ** 2, 0) + 1e-6
    links = csr_matrix((np.ones(n), (edges[:, 0], edges[:, 1])), shape=(num_nodes, num_nodes))
    _, part = connected_components(links, directed=False)
    values = np.where(part == part[reference], values - values[reference], np.nan)
    return Potentials(values, residuals, sigma)
