"""Which links and switches explain the packets that went bad.

A greedy maximum-likelihood search after Flock (Harsh et al., "Flock: Accurate network fault
localization at scale", CoNEXT 2023): each flow is a number of packets over a known path, of which
some were lost or late. A fault on a component makes all flows over it bad with probability p_bad
instead of p_good; the component that raises the likelihood most is added until none pays for its
prior. Unlike Flock's, p_bad is not one constant but the best of a few. The background p_good is
estimated again from the flows that no fault explains: with a fixed one, a healthy fabric that loses
a little everywhere is taken for a faulty one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix, hstack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ROUNDS = 5
_MAX_FAULTS = 200
# Log-odds against a component being faulty, besides the number of candidates.
_PENALTY = 5.0
_P_MIN = 1e-6
_P_GOOD_MAX = 0.1
_P_BAD_MAX = 0.95
# A fault's loss is not known beforehand: candidates above the background, in units of the larger
# of what counts as a fault and the background itself, of which each component takes its best.
_EXCESS = (1.0, 3.0, 10.0, 40.0, 160.0)


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Flows over components, and what became of their packets.

    Args:
        components: Names of links, then of switches.
        num_links: How many of `components` are links.
        members: For each switch the links at it, as indices of `components`.
        paths: [flows, components], 1.0 where a flow goes over a component.
        sent: [flows], packets sent.
        bad: [flows], packets of those that were lost, or late.
    """

    components: Sequence[str]
    num_links: int
    members: Sequence[Sequence[int]]
    paths: csr_matrix
    sent: NDArray[np.float64]
    bad: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A component that explains bad packets.

    Args:
        component: Its name.
        kind: "link" or "switch".
        confidence: Probability that it is this component rather than one of `rivals`.
        flows: Flows over it that no other finding explains.
        sent: Packets of those flows.
        bad: How many of them were lost or late.
        share_bad: `bad / sent`; more than the component's own, where a flow meets several faults.
        background: Share of bad packets on flows that no finding explains.
        log_odds: By how much it explains these flows better than chance, natural logarithm.
        rivals: Components that would explain the same flows (nearly) as well.
    """

    component: str
    kind: str
    confidence: float
    flows: int
    sent: int
    bad: int
    share_bad: float
    background: float
    log_odds: float
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pick:
    index: int
    gain: float
    flows: NDArray[np.bool_]
    rivals: list[int]
    confidence: float


def with_switches(
    links: csr_matrix, num_links: int, members: Sequence[Sequence[int]]
) -> csr_matrix:
    """Append a column for each switch: 1 where a flow goes over one of its links.

    Args:
        links: [flows, num_links].
        num_links: Columns of `links`.
        members: For each switch the columns of the links at it.
    """
    rows = np.concatenate([np.asarray(m, dtype=np.int64) for m in members] or [np.empty(0)])
    cols = np.repeat(np.arange(len(members)), [len(m) for m in members])
    at = csr_matrix((np.ones(len(rows)), (rows, cols)), shape=(num_links, len(members)))
    through = csr_matrix(links @ at)
    through.data[:] = 1.0
    return csr_matrix(hstack([links, through]))


def locate(observed: Observations, *, min_bad_rate: float = 0.002) -> list[Finding]:
    """Return the faulty components, the surest evidence first.

    Args:
        observed: What the probes saw. Flows without packets are ignored.
        min_bad_rate: How much more than the background a component has to lose to count as
            faulty. Lower values see weaker faults and need more packets to be sure.
    """
    if not len(observed.sent) or observed.sent.sum() <= 0:
        return []
    search = _Search(observed)
    p_good = max(observed.bad.sum() / observed.sent.sum(), _P_MIN)
    picks: list[_Pick] = []
    for _ in range(_ROUNDS):
        picks, rest = search.run(min(p_good, _P_GOOD_MAX), min_bad_rate)
        # Half a packet keeps a fabric that lost nothing away from an impossible probability of 0.
        bad, sent = observed.bad[rest].sum() + 0.5, max(observed.sent[rest].sum(), 1.0)
        estimate = max(bad / sent, _P_MIN)
        if abs(estimate - p_good) < 0.02 * p_good:
            break
        p_good = estimate
    findings = [_finding(observed, pick, p_good) for pick in picks]
    return sorted(findings, key=lambda finding: -finding.log_odds)


class _Search:
    """Add the component that explains most, cover its flows, and go on until none pays."""

    def __init__(self, observed: Observations) -> None:
        self._observed = observed
        self._over = csr_matrix(observed.paths.T)
        self._needed = math.log(len(observed.components)) + _PENALTY + math.log(len(_EXCESS))
        self._p_good, self._grid = 0.0, np.empty(0)

    def run(self, p_good: float, min_bad_rate: float) -> tuple[list[_Pick], NDArray[np.bool_]]:
        """Return the picks and [flows], True where no pick explains a flow."""
        self._p_good = p_good
        self._grid = p_good + np.maximum(min_bad_rate, p_good) * np.array(_EXCESS)
        self._grid = self._grid[self._grid < _P_BAD_MAX]
        num_links, needed = self._observed.num_links, self._needed
        open_flows = np.ones(len(self._observed.sent), dtype=bool)
        picks: list[_Pick] = []
        gains = self._gains(open_flows)
        while len(picks) < _MAX_FAULTS:
            best = int(np.argmax(gains))
            if gains[best] <= needed:
                break
            if best >= num_links:
                best = self._link_instead(best, gains, open_flows)
            flows = self._through(best) & open_flows
            open_flows &= ~flows
            left = self._gains(open_flows)
            picks.append(_weigh(best, gains, left, flows, needed))
            gains = left
        return picks, open_flows

    def _gains(self, open_flows: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Log-likelihood each component adds on the open flows, at the best of several rates."""
        bad = self._over @ (self._observed.bad * open_flows)
        good = self._over @ ((self._observed.sent - self._observed.bad) * open_flows)
        lost = np.log(self._grid / self._p_good)
        kept = np.log((1 - self._grid) / (1 - self._p_good))
        return (bad[:, None] * lost + good[:, None] * kept).max(axis=1)

    def _through(self, component: int) -> NDArray[np.bool_]:
        """[flows], True where a flow goes over `component`."""
        mask = np.zeros(len(self._observed.sent), dtype=bool)
        begin, end = self._over.indptr[component : component + 2]
        mask[self._over.indices[int(begin) : int(end)]] = True
        return mask

    def _link_instead(
        self, switch: int, gains: NDArray[np.float64], open_flows: NDArray[np.bool_]
    ) -> int:
        """Return the best link of `switch` where a few of its links explain as much, else itself.

        A switch with two bad links would otherwise be taken for a bad switch.
        """
        links = np.asarray(self._observed.members[switch - self._observed.num_links])
        first, total, still_open = -1, 0.0, open_flows.copy()
        left = gains
        while True:
            link = int(links[np.argmax(left[links])])
            if left[link] <= self._needed:
                break
            first = link if first < 0 else first
            total += left[link] - self._needed
            still_open &= ~self._through(link)
            left = self._gains(still_open)
        return first if first >= 0 and total >= gains[switch] - self._needed else switch


def _weigh(
    best: int,
    gains: NDArray[np.float64],
    left: NDArray[np.float64],
    flows: NDArray[np.bool_],
    needed: float,
) -> _Pick:
    """Weigh `best` against the components whose evidence it takes away."""
    rival = (gains > needed) & (left <= needed)
    rival[best] = False
    # log-odds of each rival against the best; beyond exp(-5) a rival is not worth a word.
    behind = gains[rival] - gains[best]
    close = np.flatnonzero(rival)[behind > -_PENALTY]
    confidence = 1.0 / (1.0 + float(np.exp(behind).sum()))
    order = close[np.argsort(-gains[close])]
    return _Pick(best, float(gains[best]), flows, [int(i) for i in order], confidence)


def _finding(observed: Observations, pick: _Pick, p_good: float) -> Finding:
    sent = int(observed.sent[pick.flows].sum())
    bad = int(observed.bad[pick.flows].sum())
    return Finding(
        component=observed.components[pick.index],
        kind="link" if pick.index < observed.num_links else "switch",
        confidence=pick.confidence,
        flows=int(pick.flows.sum()),
        sent=sent,
        bad=bad,
        share_bad=bad / sent if sent else 0.0,
        background=p_good,
        log_odds=pick.gain,
        rivals=tuple(observed.components[i] for i in pick.rivals),
    )
