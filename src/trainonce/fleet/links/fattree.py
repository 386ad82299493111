"""A simulated fat tree: what localisation is measured on, where no fabric is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from trainonce.errors import ConfigError
from trainonce.fleet.links.locate import Observations, with_switches

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FatTree:
    """A three-layer fat tree of k-port switches (Al-Fares et al., SIGCOMM 2008).

    k pods of k/2 edge and k/2 aggregation switches, (k/2)^2 core switches, k^3/4 hosts. Links are
    directed; a flow's path is drawn as ECMP would, uniformly over the shortest ones.

    Args:
        k: Ports of a switch, even.
    """

    def __init__(self, k: int) -> None:
        if k < 4 or k % 2:
            raise ConfigError(f"a fat tree needs an even number of ports of at least 4, not {k}")
        half = self._half = k // 2
        self.k, self.num_hosts = k, k * half * half
        pods, hosts = np.arange(k), np.arange(self.num_hosts)
        # Six layers of directed links, each numbered from its own start.
        self._host_up = 0
        self._edge_up = self._host_up + self.num_hosts
        self._agg_up = self._edge_up + k * half * half
        self._core_down = self._agg_up + k * half * half
        self._agg_down = self._core_down + k * half * half
        self._edge_down = self._agg_down + k * half * half
        self.num_links = self._edge_down + self.num_hosts
        self.names = self._link_names(hosts, pods)
        self.switches = self._switch_members()

    def _link_names(self, hosts: NDArray[np.int64], pods: NDArray[np.int64]) -> list[str]:
        half = self._half
        edge_of = [f"edge{h // half // half}.{h // half % half}" for h in hosts]
        mesh = [(p, e, a) for p in pods for e in range(half) for a in range(half)]
        core = [(p, a, c) for p in pods for a in range(half) for c in range(half)]
        return [
            *(f"host{h}->{edge}" for h, edge in zip(hosts, edge_of, strict=True)),
            *(f"edge{p}.{e}->agg{p}.{a}" for p, e, a in mesh),
            *(f"agg{p}.{a}->core{a * half + c}" for p, a, c in core),
            *(f"core{a * half + c}->agg{p}.{a}" for p, a, c in core),
            *(f"agg{p}.{a}->edge{p}.{e}" for p, e, a in mesh),
            *(f"{edge}->host{h}" for h, edge in zip(hosts, edge_of, strict=True)),
        ]

    def _switch_members(self) -> dict[str, list[int]]:
        members: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            for end in name.split("->"):
                if not end.startswith("host"):
                    members.setdefault(end, []).append(index)
        return members

    def draw_paths(self, rng: np.random.Generator, flows_per_host: int) -> csr_matrix:
        """Draw flows from every host to random others.

        Returns:
            [hosts * flows_per_host, links], 1.0 where a flow goes over a link.
        """
        half, n = self._half, self.num_hosts * flows_per_host
        src = np.repeat(np.arange(self.num_hosts), flows_per_host)
        dst = (src + rng.integers(1, self.num_hosts, n)) % self.num_hosts
        src_edge, dst_edge = src // half, dst // half  # counted over all pods
        src_pod, dst_pod = src_edge // half, dst_edge // half
        agg, core = rng.integers(0, half, n), rng.integers(0, half, n)
        rises, crosses = src_edge != dst_edge, src_pod != dst_pod
        hops = [
            (self._host_up + src, np.ones(n, dtype=bool)),
            (self._edge_up + src_edge * half + agg, rises),
            (self._agg_up + (src_pod * half + agg) * half + core, crosses),
            (self._core_down + (dst_pod * half + agg) * half + core, crosses),
            (self._agg_down + dst_edge * half + agg, rises),
            (self._edge_down + dst, np.ones(n, dtype=bool)),
        ]
        rows = np.concatenate([np.flatnonzero(used) for _, used in hops])
        cols = np.concatenate([links[used] for links, used in hops])
        return csr_matrix((np.ones(len(rows)), (rows, cols)), shape=(n, self.num_links))

    def observe(
        self,
        rng: np.random.Generator,
        loss: NDArray[np.float64],
        *,
        flows_per_host: int,
        packets: int,
    ) -> Observations:
        """Send `packets` over every flow of a fabric whose links lose `loss` [links] of them."""
        paths = self.draw_paths(rng, flows_per_host)
        lost = 1 - np.exp(paths @ np.log1p(-loss))
        sent = np.full(self.num_hosts * flows_per_host, float(packets))
        return Observations(
            components=[*self.names, *self.switches],
            num_links=self.num_links,
            members=list(self.switches.values()),
            paths=with_switches(paths, self.num_links, list(self.switches.values())),
            sent=sent,
            bad=rng.binomial(packets, lost).astype(np.float64),
        )
