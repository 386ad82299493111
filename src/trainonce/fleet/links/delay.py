"""Late packets, as evidence for slow links.

With clocks that are known well, one-way delays tell the direction of a slow link. Otherwise the
delays there and back are added, clock offsets cancel, and links lose their direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trainonce.fleet.links.locate import Observations
    from trainonce.fleet.links.topology import Fabric, Flow

# Beyond so many robust standard deviations above the usual a packet is late.
_LATE_SIGMAS = 6.0


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """One host's clock less the reference.

    Args:
        offset_s: At `at_s`, in seconds.
        bound_s: How far off that may be.
        skew: Seconds gained in a second.
        at_s: On the reference's clock, seconds since the epoch.
    """

    offset_s: float
    bound_s: float
    skew: float = 0.0
    at_s: float = 0.0

    def at(self, time_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Offset at each time, on a clock near the reference's. Skew is the last known."""
        return self.offset_s + self.skew * (time_s - self.at_s)


@dataclass(frozen=True, kw_only=True)
class DelayEvidence:
    """Late packets over links.

    Args:
        directed: Whether links have a direction.
        late_s: How much later than usual a packet counts as late.
        reason: Why links have a direction, or have none.
    """

    observed: Observations
    directed: bool
    late_s: float
    reason: str


def observe_delay(
    fabric: Fabric,
    offsets: Mapping[str, ClockOffset] | None = None,
    *,
    min_late_s: float = 20e-6,
) -> DelayEvidence | None:
    """Count late packets; None where no flow has any.

    Args:
        fabric: Flows with delays.
        offsets: Clocks by host (as in `fabric.hosts`), from `trainonce fleet clocks`.
        min_late_s: Less is never late. Clocks are good enough for directions where every
            bound is below a quarter of it.
    """
    reason = _why_undirected(fabric, offsets, min_late_s)
    if reason is None and offsets is not None:
        flows = [flow for flow in fabric.flows if len(flow.delays_ns)]
        delays = [
            flow.delays_ns / 1e9
            - offsets[flow.dst].at(flow.sent_ns / 1e9)
            + offsets[flow.src].at(flow.sent_ns / 1e9)
            for flow in flows
        ]
        links = [flow.links() for flow in flows]
        worst = max(offset.bound_s for offset in offsets.values())
        reason = f"clocks are known to {worst * 1e6:.2g} µs"
        directed = True
    else:
        pairs = _there_and_back(fabric.flows)
        delays = [delay for _, _, delay in pairs]
        links = [
            sorted({*there.links(directed=False), *back.links(directed=False)})
            for there, back, _ in pairs
        ]
        directed = False
    if not delays:
        return None
    hops = np.array([len(each) for each in links])
    late_s, late = _count_late(delays, hops, min_late_s)
    sent = np.array([len(delay) for delay in delays], dtype=np.float64)
    return DelayEvidence(
        observed=fabric.observe(sent, late, links),
        directed=directed,
        late_s=late_s,
        reason=reason or "",
    )


def _why_undirected(
    fabric: Fabric, offsets: Mapping[str, ClockOffset] | None, min_late_s: float
) -> str | None:
    if offsets is None:
        return "no clock offsets were given, so only round trips can be judged"
    missing = [host for host in fabric.hosts if host not in offsets]
    if missing:
        return f"no clock offset of {missing[0]}, so only round trips can be judged"
    worst = max(offset.bound_s for offset in offsets.values())
    if not worst <= min_late_s / 4:
        return (
            f"clocks may be off by {worst * 1e6:.3g} µs, more than a quarter of the "
            f"{min_late_s * 1e6:.3g} µs looked for, so only round trips can be judged"
        )
    return None


def _there_and_back(flows: Sequence[Flow]) -> list[tuple[Flow, Flow, NDArray[np.float64]]]:
    """Pair each flow with the one back over the same ports; add up their delays, in seconds."""
    by_key = {(flow.src, flow.dst, flow.port): flow for flow in flows}
    pairs: list[tuple[Flow, Flow, NDArray[np.float64]]] = []
    for flow in flows:
        back = by_key.get((flow.dst, flow.src, flow.port))
        if back is None or flow.src > flow.dst:
            continue
        n = min(len(flow.delays_ns), len(back.delays_ns))
        if n:
            pairs.append((flow, back, (flow.delays_ns[:n] + back.delays_ns[:n]) / 1e9))
    return pairs


def _count_late(
    delays: Sequence[NDArray[np.float64]], hops: NDArray[np.int64], min_late_s: float
) -> tuple[float, NDArray[np.float64]]:
    """Return from when on a packet is late, and [flows] how many are.

    A flow is compared with flows of as many hops; its own quantile would hide a slow link.
    """
    low = np.array([np.quantile(delay, 0.25) for delay in delays])
    usual = np.empty(len(delays))
    for count in np.unique(hops):
        usual[hops == count] = np.median(low[hops == count])
    excess = [delay - base for delay, base in zip(delays, usual, strict=True)]
    together = np.concatenate(excess)
    middle = np.median(together)
    sigma = 1.4826 * float(np.median(np.abs(together - middle)))
    late_s = max(min_late_s, float(middle) + _LATE_SIGMAS * sigma)
    return late_s, np.array([(each > late_s).sum() for each in excess], dtype=np.float64)
