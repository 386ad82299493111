"""What DDPs and pipelines settle in their first passes, which a successor has to do without.

A DDP orders its buckets when it has seen a backward pass, one with a static graph reduces once
which parameters were used, and the stages of a pipeline tell each other their shapes. The other
ranks are past that when a process takes a rank over, or do it in the very step in flight.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import CollectiveError, ConfigError
from trainonce.worker import torch_private
from trainonce.worker.copies import copy_tree
from trainonce.worker.operation import SETUP, bucket_order_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch.nn.parallel import DistributedDataParallel

    from trainonce.worker.fabric import Fabric
    from trainonce.worker.operation import Op

# Commits after which a DDP, one with a static graph included, settles its buckets.
_SETTLED = 2


class Passes:
    """The DDPs and pipelines of this process.

    Args:
        fabric: The groups; None where nothing can be recovered, and only DDPs are known.
        rehearsing: Tells whether a spare is warming up.
    """

    def __init__(self, fabric: Fabric | None, rehearsing: Callable[[], bool]) -> None:
        self._fabric = fabric
        self._rehearsing = rehearsing
        self._ddps = torch_private.DdpRegistry()
        self.pipelines = torch_private.PipelineRegistry(self._preparing_stages)
        self._adopting: int | None = None
        # Commits that trained each DDP, and of those with few the sum of parameter versions.
        self._trained: dict[int, int] = {}
        self._young: dict[int, int] = {}
        self._used_maps: list[int] = []
        # DDPs that have settled the order of their buckets, here and in the predecessor.
        self._ordered: set[int] = set()
        self._ordered_before: set[int] = set()
        self._syncs_before: list[int] = []

    def add(self, ddp: DistributedDataParallel) -> None:
        """Register a DDP that is under construction."""
        self._ddps.ordinal(ddp)

    # ------------------------------------------------------------------ handing over

    def record(self) -> dict[str, Any]:
        """Return what a successor of this rank must know, as plain values."""
        return {
            "ordered": sorted(self._ordered),
            "pipelines": copy_tree(self.pipelines.turns),
            "syncs": [
                ordinal
                for ordinal, ddp in self._ddps.living()
                if torch_private.syncs_buffers_next(ddp)
            ],
        }

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what `record` returned in a process that held this rank.

        Pipelines count on from where they were; the rest is for `adopt` and `return_to_commit`.
        """
        self._ordered_before = set(record.get("ordered", ()))
        self._syncs_before = record.get("syncs", [])
        if "pipelines" in record:
            self.pipelines.turns = copy_tree(record["pipelines"])

    def trained(self) -> list[tuple[int, int]]:
        """Return how many commits trained each DDP, up to those that suffice to know."""
        return list(self._trained.items())

    def watch(self, trained: dict[int, int]) -> None:
        """Count from now on the commits that train each DDP, beginning with `trained`.

        Two are enough to know: by then a DDP is about to settle the order of its buckets.
        """
        self._trained = dict(trained)
        self._young = {
            ordinal: _version_of(ddp)
            for ordinal, ddp in self._ddps.living()
            if self._trained.get(ordinal, 0) < _SETTLED
        }

    def count_commit(self) -> None:
        """Count a commit for the DDPs that it trained, while that matters."""
        if not self._young:
            return
        for ordinal, ddp in self._ddps.living():
            version = _version_of(ddp)
            if ordinal not in self._young or self._young[ordinal] == version:
                continue
            self._young[ordinal] = version
            self._trained[ordinal] = self._trained.get(ordinal, 0) + 1
            if self._trained[ordinal] >= _SETTLED:
                del self._young[ordinal]

    # ------------------------------------------------------------------ buffers

    def return_to_commit(self) -> None:
        """Let each DDP broadcast its buffers in the next pass exactly if it did so before."""
        for ordinal, ddp in self._ddps.living():
            torch_private.sync_buffers_next(ddp, ordinal in self._syncs_before)

    def skip_step(self) -> None:
        """Leave each DDP as a step that is skipped left it: its next pass broadcasts buffers."""
        for _, ddp in self._ddps.living():
            torch_private.sync_buffers_next(ddp, True)

    def forget(self) -> None:
        """Bring each DDP where it was before its first pass."""
        for _, ddp in self._ddps.living():
            torch_private.forget_passes(ddp)

    # ------------------------------------------------------------------ the order of buckets

    def orders_buckets(self) -> bool:
        """Tell whether a DDP is settling the order of its buckets on this thread."""
        return self._adopting is not None or torch_private.rebuilding_ddp() is not None

    def interval_of(self, op: Op) -> int | None:
        """Return the interval of its own that `op` has if it settles an order; else None."""
        ordinal = self._adopting
        if (
            ordinal is None
            and op.kind == "broadcast"
            and op.signature.startswith("broadcast(int32")
        ):
            ddp = torch_private.rebuilding_ddp()
            if ddp is not None:
                ordinal = self._ddps.ordinal(ddp)
                self._ordered.add(ordinal)
        return None if ordinal is None else bucket_order_interval(ordinal)

    def is_used_map(self, kind: str, tensors: list[torch.Tensor]) -> bool:
        """Recognise, once, what a static graph reduces in its first pass, which others are past."""
        if not self._used_maps or kind != "all_reduce" or tensors[0].dtype != torch.int32:
            return False
        if tensors[0].numel() not in self._used_maps:
            return False
        self._used_maps.remove(tensors[0].numel())
        return True

    def adopt(self, *, rehearsed: bool) -> list[Callable[[], None]]:
        """Bring each DDP to where the survivors' is: its bucket order, its first pass behind it.

        Args:
            rehearsed: The DDPs have had a backward pass here.

        Returns:
            What is to be done at the next commit.
        """
        assert self._fabric is not None
        later: list[Callable[[], None]] = []
        for ordinal, ddp in self._ddps.living():
            trained = self._trained.get(ordinal, 0)
            first_pass_missed = ddp.static_graph and trained > 0 and not rehearsed
            if first_pass_missed:
                self._used_maps.append(sum(p.requires_grad for p in ddp.parameters()))
            # An order that was settled within the step in flight is asked for in that step.
            known = self._fabric.journal.knows(bucket_order_interval(ordinal))
            if known and ordinal in self._ordered_before:
                self._ordered.add(ordinal)
                self._adopting = ordinal
                try:
                    torch_private.rebuild_buckets(ddp)
                finally:
                    self._adopting = None
            elif trained > int(ddp.static_graph):
                torch_private.mark_all_parameters_ready(ddp)
            elif first_pass_missed:
                # A static graph is rebuilt one step later than others.
                later.append(lambda ddp=ddp: torch_private.mark_all_parameters_ready(ddp))
        return later

    # ------------------------------------------------------------------ stages

    @contextmanager
    def _preparing_stages(self, schedule: Any, ready: bool, stages: list[Any]) -> Generator[bool]:
        """Surround the part in which a pipeline's stages tell each other their shapes.

        They do so when a schedule is first used, and whenever it changes between training and
        evaluation. For a process that took a rank over it is the predecessor's changes that
        count, so that it does what the others do in the same step. Beyond that its stages have to
        get ready once by themselves: served what the others said, with no trace left.

        Yields:
            Whether they get ready although they are.
        """
        if self._rehearsing():
            yield False
            return
        fabric, turns = self._fabric, self.pipelines.turns
        assert fabric is not None
        name, trains = self.pipelines.name(schedule), torch_private.trains(schedule)
        if not name:
            raise ConfigError(
                f"a {type(schedule).__name__} of torch.distributed.pipelining was made after the"
                " first step began",
                hint="make schedules before run.protect, so that every process knows them alike",
            )
        turn, trained = turns.get(name, (0, None))
        with_others = trains != trained
        if ready and not with_others:
            yield False
            return
        if with_others:
            turn += 1
            turns[name] = [turn, trains]
        if turn > 1 and any(map(torch_private.is_traced, stages)):
            raise CollectiveError(
                "a schedule of traced stages changes between training and evaluation",
                hint="build stages with PipelineStage, or evaluate with a schedule of their own",
            )
        if fabric.journal.interval == SETUP:
            yield True
            return
        fabric.begin_stages(name, turn, late=not with_others)
        buffers = [buffer for stage in stages for buffer in stage.submod.buffers()]
        copies = [] if with_others else [buffer.clone() for buffer in buffers]
        try:
            with ExitStack() as stack:
                if not with_others:
                    # A DDP that sees this pass would reduce in the next backward pass.
                    for _, ddp in self._ddps.living():
                        stack.enter_context(ddp.no_sync())
                yield True
        finally:
            fabric.end_stages()
            for buffer, copy in zip(buffers, copies, strict=False):
                buffer.data.copy_(copy)


def _version_of(ddp: DistributedDataParallel) -> int:
    """Return a number that grows whenever a parameter of `ddp` is written to."""
    return sum(parameter._version for parameter in ddp.parameters())
