"""Giving a rank's state away, and taking a rank over: the session's side of a recovery."""

from __future__ import annotations

import base64
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trainonce.errors import (
    CollectiveError,
    ConfigError,
    RecoveryError,
    StateMismatchError,
    TrainOnceError,
)
from trainonce.wire import encoding
from trainonce.wire.messages import Note
from trainonce.wire.progress import Phase
from trainonce.worker import torch_private
from trainonce.worker.channel import Channel
from trainonce.worker.host import Superseded
from trainonce.worker.operation import (
    RECEIVE,
    SEND,
    SETUP,
    STAGES,
    UNSHARED,
    bucket_order_interval,
)
from trainonce.worker.shadow import fill
from trainonce.worker.shards import stripe
from trainonce.worker.spare import call_with_batch
from trainonce.worker.state import Image, copy_tree
from trainonce.worker.transfer import (
    agree_on_digest,
    receive_parts,
    receive_record,
    send_record,
    send_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    from torch.nn.parallel import DistributedDataParallel

    from trainonce.wire.messages import Generation
    from trainonce.worker.fabric import Fabric
    from trainonce.worker.inner import InnerGroup
    from trainonce.worker.journal import Log
    from trainonce.worker.operation import Op, Outcome
    from trainonce.worker.plan import Donation, Plan
    from trainonce.worker.runner import Runner

_POLL_S = 0.005
# Commits after which a DDP, one with a static graph included, settles its buckets.
_SETTLED = 2


class _RehearsalOver(BaseException):
    """A rehearsal has come to what can only be done with the other ranks."""


class Handover:
    """The fabric's host.

    Args:
        runner: The steps and their state.
        fabric: The groups.
        device: Where the model lives, for rehearsals.
    """

    def __init__(self, runner: Runner, fabric: Fabric, device: torch.device) -> None:
        self._runner = runner
        self._fabric = fabric
        self._device = device
        self._ddps = torch_private.DdpRegistry()
        self.pipelines = torch_private.PipelineRegistry(self._preparing_stages)
        self._ordering: int | None = None
        self._trained: dict[int, int] = {}
        self._young: dict[int, int] = {}
        self._used_maps: list[int] = []
        # DDPs that have settled the order of their buckets, here and in the predecessor.
        self._ordered: set[int] = set()
        self._ordered_before: set[int] = set()
        self._restorable = threading.Event()
        self._formed = threading.Event()
        self._job_commits = threading.Event()
        self._newcomer = not runner.promotion.done
        self._took_over = False
        self._entered_at = 0
        self._recalled: Outcome | None = None
        self.private = False
        self.sample: Callable[[], Any] | None = None

    @property
    def is_newcomer(self) -> bool:
        """Whether this process takes over a rank that others have trained with."""
        return self._newcomer

    @property
    def skips(self) -> bool:
        """Whether this process took a rank over and has not executed a step of its own yet."""
        return self._took_over and self._runner.commits == self._entered_at

    @property
    def shards(self) -> list[str]:
        """Shard key of each rank; empty where nothing is split."""
        return self._runner.shards

    # ------------------------------------------------------------------ operations

    @property
    def in_step(self) -> bool:
        """Whether a step is under way."""
        return self._runner.executing

    def emulate(self, kind: str, tensors: list[torch.Tensor]) -> bool:
        """Tell whether to answer a collective locally.

        In rehearsals; in the constructor of DDP of a process that takes a rank over, since the
        others have long left theirs; and between steps that are committed, without a result.
        """
        if self._runner.rehearsing:
            if kind == "broadcast" and torch_private.rebuilding_ddp() is not None:
                raise _RehearsalOver
            return True
        if self._used_maps and self._is_used_map(kind, tensors):
            return True
        if self._fabric.stages_late and kind not in (SEND, RECEIVE):
            # Only shapes matter there; but a DDP may be about to settle its buckets.
            return not self.orders_buckets()
        if self._fabric.journal.interval != SETUP:
            again, recalled = self._runner.recall(kind, tensors)
            self._recalled = recalled
            return again and recalled is None
        ddp = torch_private.constructing_ddp()
        if ddp is None:
            return False
        self._ddps.ordinal(ddp)
        return self._newcomer

    def recall(self) -> Outcome | None:
        """Take the kept result of the collective that `emulate` was asked about last."""
        recalled, self._recalled = self._recalled, None
        return recalled

    def _is_used_map(self, kind: str, tensors: list[torch.Tensor]) -> bool:
        """Recognise what a static graph reduces in its first pass only, which others are past."""
        if kind != "all_reduce" or tensors[0].dtype != torch.int32:
            return False
        if tensors[0].numel() not in self._used_maps:
            return False
        self._used_maps.remove(tensors[0].numel())
        return True

    def passes(self) -> dict[str, Any]:
        """Return what a successor of this rank must know of its DDPs and pipelines."""
        return {
            "ordered": sorted(self._ordered),
            "pipelines": copy_tree(self.pipelines.turns),
            "syncs": [
                ordinal
                for ordinal, ddp in self._ddps.living()
                if torch_private.syncs_buffers_next(ddp)
            ],
        }

    def return_to_commit(self) -> None:
        """Let each DDP broadcast its buffers in the next pass exactly if it did so before."""
        syncs: list[int] = self._runner.local.passes_before.get("syncs", [])
        for ordinal, ddp in self._ddps.living():
            torch_private.sync_buffers_next(ddp, ordinal in syncs)

    def pass_over(self) -> None:
        """Leave each DDP as a step that is skipped left it: its next pass broadcasts buffers."""
        for _, ddp in self._ddps.living():
            torch_private.sync_buffers_next(ddp, True)

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
        fabric, pipelines = self._fabric, self.pipelines
        if self._runner.rehearsing:
            yield False
            return
        name, trains = pipelines.name(schedule), torch_private.trains(schedule)
        if not name:
            raise ConfigError(
                f"a {type(schedule).__name__} of torch.distributed.pipelining was made after the"
                " first step began",
                hint="make schedules before run.protect, so that every process knows them alike",
            )
        turn, trained = pipelines.turns.get(name, (0, None))
        with_others = trains != trained
        if ready and not with_others:
            yield False
            return
        if with_others:
            turn += 1
            pipelines.turns[name] = [turn, trains]
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

    def before_submit(self, log: Log, op: Op) -> int | None:
        """Place an operation, and let the step prepare for it."""
        if self._ordering is not None:
            return bucket_order_interval(self._ordering)
        if self._fabric.journal.interval == SETUP:
            if self.private or torch_private.constructing_ddp() is not None:
                return UNSHARED
            self._runner.promotion.park("collective")
            return None
        if op.kind == "broadcast" and op.signature.startswith("broadcast(int32"):
            ddp = torch_private.rebuilding_ddp()
            if ddp is not None:
                ordinal = self._ddps.ordinal(ddp)
                self._ordered.add(ordinal)
                return bucket_order_interval(ordinal)
        if isinstance(log, Channel):
            self._check_messages()
        if not self._runner.inside:
            self._runner.collective_between(op)
        self._runner.before_operation(spans_world=log.spans_world)
        return STAGES if isinstance(log, Channel) and log.stages else None

    def _check_messages(self) -> None:
        """Refuse what the other ranks could not reckon with, or what cannot be told apart."""
        if not self._runner.expects_messages():
            raise CollectiveError(
                "a message is sent or received in a later execution of a step, and none was in"
                " an earlier one",
                hint="the first execution tells all ranks of it: do so there too, or make a"
                " group of some ranks before run.protect (dist.new_group, init_device_mesh)",
            )
        if self._runner.executing and torch_private.pipelines_unwatched():
            raise CollectiveError(
                "torch.distributed.pipelining was imported inside a step",
                hint="import it at the top of the script",
            )

    def orders_buckets(self) -> bool:
        """Tell whether a DDP is settling the order of its buckets on this thread."""
        return self._ordering is not None or torch_private.rebuilding_ddp() is not None

    def after_submit(self) -> None:
        """Let the fault plan act once an operation is issued."""
        if self._fabric.journal.interval != SETUP:
            self._runner.injector.at("collective")

    def fault_point(self, point: str) -> None:
        """Let the fault plan act."""
        self._runner.injector.at(point)

    # ------------------------------------------------------------------ giving

    def frozen(self, superseded: Callable[[], bool]) -> AbstractContextManager[None]:
        """Hold updates and commits back."""
        return self._runner.gate.frozen(superseded)

    def can_donate(self) -> bool:
        """Tell whether the state as of the last commit is here, complete and unchanged."""
        runner = self._runner
        if runner.protected is None:
            return False
        if runner.image is not None or runner.execution is None:
            return True
        return not (runner.execution.stepped or runner.protected.parameters_changed())

    def donate(self, inner: InnerGroup, donation: Donation) -> tuple[str, int]:
        """Send this rank's part of the state as of the last commit.

        Returns:
            Digest of all parts in the first of the sources, empty in the others; bytes.
        """
        runner = self._runner
        assert runner.protected is not None
        image = runner.image or runner.protected.live()
        place = donation.sources.index(runner.rank)
        if place == 0:
            record = self.describe(image)
            for target in donation.targets:
                send_record(inner, target, record)
        part = stripe(image.tensors, place, len(donation.sources))
        digest, size = send_state(inner, donation.targets, part)
        return agree_on_digest(inner, donation.sources, place, digest), size

    def describe(self, image: Image) -> dict[str, Any]:
        """Return all that a successor needs beside the bytes of `image`, as plain values."""
        runner = self._runner
        assert runner.protected is not None
        return {**runner.protected.describe(image), **self._describe_rest()}

    def describe_later(self) -> Callable[[], dict[str, Any]]:
        """Return what gives the description of the state as it is now, on another thread."""
        protected = self._runner.protected
        assert protected is not None
        rest, image, small = self._describe_rest(), protected.live(), protected.small
        image = Image(image.tensors, copy_tree(image.scalars))
        return lambda: {**protected.describe(image, small), **rest}

    def _describe_rest(self) -> dict[str, Any]:
        runner = self._runner
        return {
            "trained": list(self._trained.items()),
            "profiles": runner.profiles.to_record(),
            "returned": base64.b64encode(encoding.encode(runner.local.returned())).decode(),
            "started_at": runner.started_at,
            "reduces_means": runner.means.reduced(runner.commits),
            "poll": runner.durable.record() if runner.durable is not None else None,
        }

    def watch_passes(self, trained: dict[int, int]) -> None:
        """Count from now on the commits that train each DDP, beginning with `trained`.

        Two are enough to know: by then a DDP is about to settle the order of its buckets.
        """
        self._trained = dict(trained)
        self._young = {
            ordinal: _version_of(ddp)
            for ordinal, ddp in self._ddps.living()
            if self._trained.get(ordinal, 0) < _SETTLED
        }
        self._runner.on_commit = self._count_passes

    def _count_passes(self) -> None:
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

    # ------------------------------------------------------------------ taking

    def wait_restorable(self, superseded: Callable[[], bool]) -> None:
        """Wait until the script stands before its first loop or step."""
        while not self._restorable.wait(_POLL_S):
            if superseded():
                raise Superseded

    def receive(self, inner: InnerGroup, donation: Donation, plan: Plan) -> tuple[str, int]:
        """Take the state over, and the local state that the rank left in its mirror."""
        runner, commits = self._runner, plan.commits
        assert runner.protected is not None
        runner.injector.at("promotion", commits)
        self._take_shards(plan)
        record = receive_record(inner, donation.sources[0])
        tensors = runner.protected.prepare(record)
        count = len(donation.sources)
        parts = [stripe(tensors, index, count) for index in range(count)]
        result = receive_parts(inner, donation.sources, parts)
        payload = runner.local.find(commits)
        if payload is None:
            raise RecoveryError(
                f"the local state of rank {runner.rank} at step {commits} went down with it",
                hint="this happens if a step issues fewer collectives than ever before",
            )
        self._stand_at(commits, record, payload)
        return result

    def restore(self, plan: Plan) -> tuple[str, int]:
        """Take the state, and what the rank kept to itself, from the shadow that it left."""
        runner = self._runner
        assert runner.protected is not None
        commits = plan.restores[runner.rank]
        runner.injector.at("promotion", plan.commits)
        self._take_shards(plan)
        copy = runner.shadow.read(commits)
        size = fill(runner.protected.prepare(copy.record), copy.data)
        self._stand_at(commits, copy.record, copy.payload)
        return "", size

    def shadow_commits(self) -> list[int]:
        """Return for which numbers of committed steps the rank left a whole shadow."""
        return self._runner.shadow.commits()

    def resume_from_shadow(self, commits: int) -> None:
        """Load what `restore` loads, in a start of all ranks: as from a checkpoint."""
        runner = self._runner
        assert runner.protected is not None
        copy = runner.shadow.read(commits)
        fill(runner.protected.prepare(copy.record), copy.data)
        runner.restore_record(copy.payload, commits)

    def _stand_at(self, commits: int, record: dict[str, Any], payload: bytes) -> None:
        runner = self._runner
        returned = encoding.decode(base64.b64decode(record["returned"]))
        runner.restore_record(payload, commits, returned)
        runner.begin_at(commits, started_at=record["started_at"])
        runner.means.expect(record["reduces_means"], commits)
        runner.profiles.load(record["profiles"])
        self._ordered_before = set(runner.local.passes_before.get("ordered", ()))
        self.take_turns()
        self.watch_passes(dict(record["trained"]))
        if runner.durable is not None and record["poll"] is not None:
            runner.durable.restore(record["poll"])
        runner.restored()

    def take_turns(self) -> None:
        """Count on from where the predecessor's pipelines were at the last commit."""
        turns = self._runner.local.passes_before.get("pipelines")
        if turns is not None:
            self.pipelines.turns = copy_tree(turns)

    def _take_shards(self, plan: Plan) -> None:
        runner = self._runner
        assert runner.protected is not None
        runner.split_state(list(plan.shards) or [""] * runner.world_size)
        if not plan.shards:
            return
        if runner.protected.shard_key(runner.rank) != runner.shards[runner.rank]:
            raise StateMismatchError(
                f"rank {runner.rank} splits its state differently than the process that held"
                " this rank before",
                hint="build the same model on a mesh of the same shape, whoever builds it",
            )

    def adopt_mirror(self, fd: int) -> None:
        """Go on with the mirror of the process that held this rank."""
        self._runner.local.adopt_mirror(fd)

    def adopt_shadow(self, fd: int) -> None:
        """Go on with the shadow of the process that held this rank."""
        self._runner.shadow.adopt(fd)

    def formed(self, message: Generation) -> None:
        """Let the script go on."""
        self._runner.progress["generation"] = message.generation
        self._formed.set()

    def job_has_committed(self) -> None:
        """The job is past its first step, so that a spare may rehearse."""
        self._job_commits.set()

    def take_over(self) -> None:
        """As a spare: rehearse, wait for a rank and its state, and make ready to execute."""
        runner = self._runner
        while not (self._job_commits.wait(_POLL_S) or runner.promotion.done):
            pass
        rehearsed = 0 if runner.promotion.done else self._rehearse()
        self._restorable.set()
        runner.promotion.park("loop", rehearsed=rehearsed)
        runner.progress["phase"] = Phase.RECOVERING
        self._formed.wait()
        self._newcomer = False
        self._took_over, self._entered_at = True, runner.commits
        self._adopt_buckets(rehearsed=rehearsed > 0)
        runner.means.reduce(runner.commits)
        runner.follow_up()

    def _adopt_buckets(self, *, rehearsed: bool) -> None:
        """Bring each DDP to where the survivors' is: its bucket order, its first pass behind it."""
        for ordinal, ddp in self._ddps.living():
            trained = self._trained.get(ordinal, 0)
            first_pass_missed = ddp.static_graph and trained > 0 and not rehearsed
            if first_pass_missed:
                self._used_maps.append(sum(p.requires_grad for p in ddp.parameters()))
            # An order that was settled within the step in flight is asked for in that step.
            known = self._fabric.journal.knows(bucket_order_interval(ordinal))
            if known and ordinal in self._ordered_before:
                self._ordered.add(ordinal)
                self._ordering = ordinal
                try:
                    torch_private.rebuild_buckets(ddp)
                finally:
                    self._ordering = None
            elif trained > int(ddp.static_graph):
                torch_private.mark_all_parameters_ready(ddp)
            elif first_pass_missed:
                # A static graph is rebuilt one step later than others.
                self._runner.at_next_commit(
                    lambda ddp=ddp: torch_private.mark_all_parameters_ready(ddp)
                )

    def _rehearse(self) -> int:
        """Execute each step once on a sample batch, then put everything back.

        Warms up whatever is lazy: kernels, allocators, compilers, optimizer state. Where a DDP
        comes to order its buckets, which is in its second pass, the rehearsal ends: their order
        is that of the other ranks, and not known yet.
        """
        runner = self._runner
        if self.sample is None or runner.protected is None:
            return 0
        rehearsed = 0
        image = runner.protected.image()
        small = runner.protected.copy_small()
        hooks = copy_tree(runner.protected.hooks.read())
        runner.rehearsing = True
        try:
            batch = self.sample()
            for step in runner.steps:
                rehearsed += call_with_batch(step.function, batch, self._device)
        except TrainOnceError:
            raise
        except _RehearsalOver:
            rehearsed += 1
        except Exception as error:
            runner.notify(
                Note(
                    key="rehearsal", text=f"spares cannot rehearse ({error}); they wait as they are"
                )
            )
        finally:
            for _, parameter in runner.protected.parameters():
                parameter.grad = None
            for _, ddp in self._ddps.living():
                torch_private.forget_passes(ddp)
            runner.protected.restore(image)
            runner.protected.load_small(small)
            runner.protected.hooks.load(hooks)
            runner.rehearsing = False
        return rehearsed


def _version_of(ddp: DistributedDataParallel) -> int:
    """Return a number that grows whenever a parameter of `ddp` is written to."""
    return sum(parameter._version for parameter in ddp.parameters())
