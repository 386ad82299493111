"""A recovery: how this rank gets to where all ranks of a generation are consistent.

The ranks form the new inner group, exchange what each has, compute the same plan, hand over
results and state, and issue again what nobody completed. The rules are those of
docs/protocol.md, "A recovery".
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

from trainonce.errors import CollectiveError, TrainOnceError
from trainonce.wire.messages import Formed, PeerLost
from trainonce.worker.host import Superseded
from trainonce.worker.inner import InnerGroup
from trainonce.worker.plan import Plan, RankReport, plan_recovery
from trainonce.worker.transfer import receive_tensors, send_tensors

if TYPE_CHECKING:
    from trainonce.wire.messages import Generation
    from trainonce.worker.fabric import Fabric
    from trainonce.worker.host import Host
    from trainonce.worker.journal import Log
    from trainonce.worker.operation import Op

_POLL_S = 0.002


class Recovery:
    """One generation, from its announcement to where this rank goes on in it.

    `start` begins a thread of its own, on which all else runs. From the announcement of the next
    generation on this one is void: whoever announces it aborts `inner`, which ends any wait in
    it, and every other wait asks `superseded`. The results that came by then stay.

    Args:
        fabric: Of this worker. The journal's lock is held to read or change what it shares with
            training threads.
        host: Of the fabric.
        generation: What was announced.
    """

    def __init__(self, fabric: Fabric, host: Host, generation: Generation) -> None:
        self._fabric = fabric
        self._host = host
        self.generation = generation
        self._journal = fabric.journal
        self._newcomer = fabric.is_newcomer(generation)
        self.inner = InnerGroup(generation.rank, len(generation.workers))
        self._received_bytes = 0

    def start(self) -> None:
        """Begin; whoever announces the generation calls this."""
        name = f"recover-{self.generation.generation}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def superseded(self) -> bool:
        """Tell whether a newer generation was announced."""
        return self._fabric.recovery is not self

    def _check(self) -> None:
        if self.superseded():
            raise Superseded

    def _run(self) -> None:
        try:
            self._recover()
        except Superseded:
            return
        except TrainOnceError as error:
            self._tell_failed(str(error), parted=isinstance(error, CollectiveError))
        except RuntimeError as error:
            # A peer went away while we were at it. The controller will announce anew.
            if not self.superseded():
                self._fabric.notify(
                    PeerLost(generation=self.generation.generation, error=str(error)[:500])
                )
        except Exception as error:
            self._tell_failed(f"{type(error).__name__}: {error}")

    def _tell_failed(self, error: str, *, parted: bool = False) -> None:
        self._fabric.notify(
            Formed(
                generation=self.generation.generation,
                step=self._journal.commits,
                error=error,
                parted=parted,
            )
        )

    def _recover(self) -> None:
        generation = self.generation
        # Without newcomers all ranks start together, and nobody has anything yet.
        first = not self._fabric.consistent and not generation.newcomers
        self._check()
        self.inner.form(
            generation.store_port, f"{generation.incarnation}/{generation.generation}/world"
        )
        self._host.fault_point("recovery")
        if first:
            self._go_on()  # the controller waits for `Ready`
            return
        while (catch_up_to := self._try_once()) is not None:
            while self._journal.commits < catch_up_to:
                self._check()
                time.sleep(_POLL_S)

    def _try_once(self) -> int | None:
        """Agree, move results, and move state if nobody has to commit first.

        Returns:
            Nothing where the recovery is over. Else all plan again, once this rank has committed
            so many steps.
        """
        completed: list[tuple[Log, Op]] = []
        try:
            with self._host.frozen(self.superseded):
                self._check()
                plan = self._agree()
                self._move_results(plan, completed)
                if not plan.catch_up:
                    self._hand_over(plan)
                    return None
        finally:
            # Also where the recovery was abandoned: nobody gives them once more.
            for log, op in completed:
                self._fabric.dispatcher.finish(log, op)
        return plan.commits if self.generation.rank in plan.catch_up else 0

    # ------------------------------------------------------------------ to agree

    def _agree(self) -> Plan:
        """Exchange what each rank has, and return what is to be done about it."""
        report = json.dumps(self._report().to_record()).encode()
        gathered = self.inner.gather_bytes(report)
        reports = [RankReport.from_record(json.loads(one)) for one in gathered]
        self._fabric.learn(reports)
        plan = plan_recovery(reports)
        self._fabric.order_ranks = plan.order_ranks
        return plan

    def _report(self) -> RankReport:
        host, journal, fresh = self._host, self._journal, self._newcomer
        with journal.lock:
            intervals = journal.reported_intervals()
            for channel in journal.channels.values():
                channel.hand_over()
            return RankReport(
                fresh=fresh,
                commits=journal.commits,
                donor=not fresh and host.can_donate(),
                original=self._fabric.original,
                groups=journal.groups_known(),
                channels=journal.channels_known(),
                ops=journal.describe(intervals, self.generation.rank),
                shards=[] if fresh else host.shards,
                shadows=host.shadow_commits() if fresh else [],
                dropped=journal.has_dropped(intervals),
                since=journal.since,
                messages=self._fabric.messages,
            )

    # ------------------------------------------------------------------ to hand over

    def _move_results(self, plan: Plan, completed: list[tuple[Log, Op]]) -> None:
        """Hand logged results over.

        Args:
            plan: Who gives what.
            completed: Gets the operations that now have their result.
        """
        rank, journal = self.generation.rank, self._journal
        journal.follow(plan)
        for transfer in plan.results:
            if rank == transfer.source:
                result = journal.result(transfer.name)
                for target in transfer.targets:
                    send_tensors(self.inner, target, result)
            elif rank in transfer.targets:
                tensors = receive_tensors(self.inner, transfer.source)
                self._received_bytes += sum(tensor.nbytes for tensor in tensors)
                waiting = journal.place(transfer.name, (transfer.signature, tensors))
                if waiting is not None:
                    completed.append(waiting)

    def _hand_over(self, plan: Plan) -> None:
        """Move state, and go on in the new generation. Updates are held back."""
        with self._journal.lock:
            self._check()
            self._fabric.replayable.set()
        if self._newcomer:
            # Its script runs on through set-up, served from the log, to where it restores.
            self._host.wait_restorable(self.superseded)
        digest, moved = self._move_state(plan)
        self._tell_formed(plan, digest, moved)
        self.inner.barrier()
        self._go_on()

    def _tell_formed(self, plan: Plan, digest: str, moved: int) -> None:
        """Tell the controller that this rank holds the state.

        Before anybody goes on: should the donor be lost from then on, a newcomer is known to have
        a living copy.
        """
        rank = self.generation.rank
        with self._journal.lock:
            self._check()
            self._fabric.consistent = True
        self._fabric.notify(
            Formed(
                generation=self.generation.generation,
                step=plan.restores.get(rank, plan.commits),
                recompute=plan.num_recomputed(rank) if self._newcomer else 0,
                bytes_moved=moved + self._received_bytes,
                digest=digest,
                from_shadow=rank in plan.restores,
            )
        )

    def _move_state(self, plan: Plan) -> tuple[str, int]:
        """Give or take the state; return its digest and the bytes received."""
        rank, host = self.generation.rank, self._host
        if rank in plan.restores:
            return host.restore(plan)
        for donation in plan.donations:
            if rank in donation.sources:
                host.fault_point("donate")
                digest, _ = host.donate(self.inner, donation)
                return digest, 0
            if rank in donation.targets:
                return host.receive(self.inner, donation, plan)
        return "", 0

    def _go_on(self) -> None:
        """Use the new inner group, and issue again what nobody has completed."""
        with self._journal.lock:
            self._check()
            self._fabric.consistent = True
            self._fabric.dispatcher.connect(self.generation, self.inner)
        self._host.formed(self.generation)
