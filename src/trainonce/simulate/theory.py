"""Closed forms: what the simulator is checked against, and where its defaults come from."""

from __future__ import annotations

import math

from scipy.stats import poisson


def young_interval_s(write_s: float, mttf_s: float) -> float:
    """Checkpoint interval that wastes least, to first order (Young, CACM 1974)."""
    return math.sqrt(2 * write_s * mttf_s)


def ettr_first_order(
    *, interval_s: float, write_s: float, recover_s: float, mttf_s: float
) -> float:
    """Share of the time that is productive (Kokolis et al., HPCA 2025, equation for E[ETTR]).

    Holds while a recovery and half an interval are short against the mean time to failure.
    """
    return (1 - (recover_s + interval_s / 2) / mttf_s) / (1 + write_s / interval_s)


def ettr_exact(*, interval_s: float, write_s: float, recover_s: float, mttf_s: float) -> float:
    """Share of the time that is productive, at any failure rate (Daly, FGCS 2006, section 3).

    A failure may hit computation, the checkpoint write and the recovery alike; each segment of
    `interval_s` takes `mttf * e^(recover/mttf) * (e^((interval + write)/mttf) - 1)` on average.
    """
    grow = math.expm1((interval_s + write_s) / mttf_s)
    return interval_s / (mttf_s * math.exp(recover_s / mttf_s) * grow)


def mean_nodes_out(*, rate_per_s: float, mean_out_s: float) -> float:
    """Mean number of nodes in repair (Little's law)."""
    return rate_per_s * mean_out_s


def spares_that_pay(*, nodes_out: float, stall_nodes: float) -> int:
    """Return the smallest number of idle spares after which one more costs more than it saves.

    With S spares the job stands still for the share P(X > S) of the time, where the number X of
    nodes out is Poisson. One more spare costs one node, and saves at most `stall_nodes` of them for
    that share of the time; so the last spare that pays is the newsvendor's.

    Args:
        nodes_out: Mean number of nodes out at a time.
        stall_nodes: Nodes that stand still while one of them has no replacement.
    """
    if stall_nodes <= 1:
        return 0
    return int(poisson.isf(1 / stall_nodes, nodes_out)) if nodes_out > 0 else 0
