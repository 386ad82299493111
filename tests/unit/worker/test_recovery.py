"""One generation in one rank: what is done and told in which order."""

import contextlib
import json
import threading
from types import SimpleNamespace

from trainonce.wire.messages import Formed, Generation
from trainonce.wire.progress import Progress
from trainonce.worker import recovery
from trainonce.worker.fabric import Fabric
from trainonce.worker.plan import RankReport


class Donor:
    """Stands in for the inner group with a donor as rank 0, and notes what its peer does."""

    def __init__(self, order):
        self.order = order

    def form(self, store_port, prefix):
        pass

    def gather_bytes(self, data):
        donor = RankReport(fresh=False, commits=5, donor=True)
        return [json.dumps(donor.to_record()).encode(), data]

    def barrier(self):
        self.order.append("met the donor")


def test_a_newcomer_tells_that_it_holds_the_state_before_the_donor_can_go_on(monkeypatch):
    order, gone_on = [], threading.Event()
    monkeypatch.setattr(recovery, "InnerGroup", lambda rank, size: Donor(order))
    fabric = Fabric(2, Progress.create_private(), order.append)
    fabric.host = SimpleNamespace(
        frozen=lambda superseded: contextlib.nullcontext(),
        fault_point=lambda point: None,
        shadow_commits=list,
        wait_restorable=lambda superseded: None,
        receive=lambda inner, donation, plan: ("digest", 1000),
        formed=lambda generation: gone_on.set(),
    )
    fabric.announce(Generation(generation=2, rank=1, workers=[0, 2], newcomers=[1], store_port=0))
    gone_on.wait()
    formed, met = order
    assert met == "met the donor"
    assert formed == Formed(generation=2, step=5, recompute=1, bytes_moved=1000, digest="digest")
    # Were the donor lost in that instant, this rank would be no newcomer any more.
    assert not fabric.is_newcomer(fabric.recovery.generation)
