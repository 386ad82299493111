"""Giving a rank's state away, and taking a rank over: the session's side of a recovery."""

from __future__ import annotations

import base64
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainonce.errors import (
    CollectiveError,
    RecoveryError,
    StateMismatchError,
)
from trainonce.wire import encoding
from trainonce.wire.messages import Note
from trainonce.wire.progress import Phase
from trainonce.worker import torch_private
from trainonce.worker.channel import Channel
from trainonce.worker.copies import copy_tree
from trainonce.worker.host import Superseded
from trainonce.worker.operation import (
    RECEIVE,
    SEND,
    SETUP,
    STAGES,
    UNSHARED,
)
from trainonce.worker.shadow import fill
from trainonce.worker.shards import stripe
from trainonce.worker.spare import call_with_batch
from trainonce.worker.state import Image
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

    import torch

    from trainonce.wire.messages import Generation
    from trainonce.worker.fabric import Fabric
    from trainonce.worker.inner import InnerGroup
    from trainonce.worker.journal import Log
    from trainonce.worker.operation import Op, Outcome
    from trainonce.worker.plan import Donation, Plan
    from trainonce.worker.runner import Runner
    from trainonce.worker.sources import Sources
    from trainonce.worker.step import Step

_POLL_S = 0.005


class _RehearsalOver(BaseException):
    """A rehearsal has come to what can only be done with the other ranks."""


class Handover:
    """The fabric's host.

    Args:
        runner: The steps and their state.
        fabric: The groups.
        sources: The loaders, for rehearsals.
        device: Where the model lives, for rehearsals.
    """

    def __init__(
        self, runner: Runner, fabric: Fabric, sources: Sources, device: torch.device
    ) -> None:
        self._runner = runner
        self._fabric = fabric
        self._sources = sources
        self._device = device
        self._passes = runner.passes
        self._restorable = threading.Event()
        self._formed = threading.Event()
        self._job_commits = threading.Event()
        self._newcomer = not runner.promotion.done
        self._took_over = False
        self._entered_at = 0
        self._private = False

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

    @contextmanager
    def in_private(self) -> Generator[None]:
        """Within it, collectives of the set-up are ours, and not repeated by a successor."""
        self._private = True
        try:
            yield
        finally:
            self._private = False

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
        if self._passes.is_used_map(kind, tensors):
            return True
        if self._fabric.stages_late and kind not in (SEND, RECEIVE):
            # Only shapes matter there; but a DDP may be about to settle its buckets.
            return not self._passes.orders_buckets()
        if self._fabric.journal.interval != SETUP:
            replay = self._runner.replay
            behind = not self._runner.inside and replay.is_behind_others(kind, tensors)
            return behind and not replay.has_recalled
        ddp = torch_private.constructing_ddp()
        if ddp is None:
            return False
        self._passes.add(ddp)
        return self._newcomer

    def recall(self) -> Outcome | None:
        """Take the kept result of the collective that `emulate` was asked about last."""
        return self._runner.replay.recalled()

    def before_submit(self, log: Log, op: Op) -> int | None:
        """Place an operation, and let the step prepare for it."""
        if self._fabric.journal.interval == SETUP:
            if self._private or torch_private.constructing_ddp() is not None:
                return UNSHARED
            self._runner.promotion.park("collective")
            return None
        interval = self._passes.interval_of(op)
        if interval is not None:
            return interval
        if isinstance(log, Channel):
            self._check_messages()
        if not self._runner.inside:
            self._runner.replay.note_collective(op)
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
            "trained": self._passes.trained(),
            "profiles": runner.profiles.to_record(),
            "returned": base64.b64encode(encoding.encode(runner.local.returned())).decode(),
            "started_at": runner.started_at,
            "reduces_means": runner.means.reduced(runner.commits),
            "poll": runner.durable.record() if runner.durable is not None else None,
        }

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
                hint="this happens if a step issues fewer collectives than it did before",
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
        self._passes.watch(dict(record["trained"]))
        if runner.durable is not None and record["poll"] is not None:
            runner.durable.restore(record["poll"])
        runner.restored()

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
        for action in self._passes.adopt(rehearsed=rehearsed > 0):
            runner.at_next_commit(action)
        runner.means.reduce(runner.commits)
        runner.follow_up()

    def _rehearse(self) -> int:
        """Execute each step once on a sample batch, then put everything back.

        Warms up whatever is lazy: kernels, allocators, compilers, optimizer state. Where a DDP
        comes to order its buckets, which is in its second pass, the rehearsal ends: their order
        is that of the other ranks, and not known yet.
        """
        runner = self._runner
        sample = self._sources.sample()
        if sample is None or runner.protected is None:
            return 0
        rehearsed = 0
        image = runner.protected.image()
        small = runner.protected.copy_small()
        hooks, modes = copy_tree(runner.protected.hooks.read()), runner.protected.modes.read()
        runner.rehearsing = True
        try:
            batch = sample()
            for step in runner.steps:
                rehearsed += self._rehearse_step(step, batch)
        except _RehearsalOver:
            rehearsed += 1
        finally:
            for _, parameter in runner.protected.parameters():
                parameter.grad = None
            self._passes.forget()
            runner.protected.restore(image)
            runner.protected.load_small(small)
            runner.protected.hooks.load(hooks)
            runner.protected.modes.load(modes)
            runner.rehearsing = False
        return rehearsed

    def _rehearse_step(self, step: Step[Any, Any], batch: Any) -> bool:
        """Execute one step on a sample batch; tell whether it could be."""
        try:
            return call_with_batch(step.function, batch, self._device)
        except Exception as error:  # one of ours too: its parameter need not be a batch
            name, why = step.function.__name__, str(error).partition("\n")[0]
            text = f"spares cannot rehearse {name} ({why}); they wait as they are"
            self._runner.notify(Note(key=f"rehearsal-{name}", text=text))
            return False
