"""Makes steps exactly once: what happens from the start of a step to its commit.

One instance a process; `docs/protocol.md` states the rules. Taking over a rank, and giving
state to a process that does, is in `handover`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from trainonce.errors import ConfigError, StepError
from trainonce.wire.messages import Drained, Note, Ready, Report
from trainonce.wire.progress import Phase
from trainonce.worker.cursor import Cursor
from trainonce.worker.drain import DrainOrder
from trainonce.worker.faults import FaultInjector
from trainonce.worker.gate import UpdateGate
from trainonce.worker.local import LocalState
from trainonce.worker.loops import Loops
from trainonce.worker.means import Means
from trainonce.worker.passes import Passes
from trainonce.worker.publication import Publication
from trainonce.worker.replay import Replay
from trainonce.worker.shadow import Shadow
from trainonce.worker.shards import copy_holders
from trainonce.worker.step import (
    Execution,
    StepProfiles,
    UpdateKind,
    seed_between,
    seed_section,
)
from trainonce.worker.telemetry import Telemetry
from trainonce.worker.values import (
    MAX_MEANS,
    LazyMean,
    outline,
)
from trainonce.worker.verify import compare_replicas, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from trainonce.wire.progress import Progress
    from trainonce.worker.durable import Durable
    from trainonce.worker.fabric import Fabric
    from trainonce.worker.spare import Promotion
    from trainonce.worker.state import Image, Protected
    from trainonce.worker.step import Step

# Ranks that keep a copy of the state from before an update, where a step needs one.
_HOLDERS = (0, 1)


class Runner:
    """Executes steps, commits them, and keeps what a successor needs.

    Args:
        seed: All generators are derived from it.
        world_size: Number of ranks.
        promotion: The rank of this worker, now or later.
        progress: Page on which to say where this worker stands.
        fabric: Carries out collectives; None where nothing can be recovered.
        notify: Sends a message to the launcher, and descriptors with it.
    """

    def __init__(
        self,
        *,
        seed: int,
        world_size: int,
        promotion: Promotion,
        progress: Progress,
        fabric: Fabric | None,
        notify: Callable[..., object],
    ) -> None:
        self.seed = seed
        self.world_size = world_size
        self.promotion = promotion
        self.progress = progress
        self.fabric = fabric
        self.notify = notify
        self.gate = UpdateGate()
        self.cursor = Cursor()
        self.injector = FaultInjector(notify, lambda: self.commits, self._parameters)
        self.loops = Loops(
            self.cursor,
            enter=self.enter,
            fault_point=self.injector.at,
            inside_step=lambda: self.commits if self.executing or self.rehearsing else None,
            cannot_count=self._tell_of_enumerate,
            begin=lambda frame: self.replay.begin_iteration(frame),
        )
        self.passes = Passes(fabric, lambda: self.rehearsing)
        self.local = LocalState(
            world_size=world_size,
            promotion=promotion,
            progress=progress,
            cursor=self.cursor,
            loops=self.loops,
            passes=self.passes,
            notify=notify,
        )
        self.replay = Replay(
            cursor=self.cursor,
            local=self.local,
            loops=self.loops,
            passes=self.passes,
            promotion=promotion,
            return_state=self._return_state,
            notify=notify,
        )
        self.telemetry = Telemetry(progress, self.loops)
        self.means = Means(world_size)
        self.protected: Protected | None = None
        self.publication: Publication | None = None
        self.steps: list[Step[Any, Any]] = []
        """Those of set-up, for rehearsals."""
        self.commits = 0
        self.rehearsing = False
        self.inside = False
        """Whether what runs is a step, or ours, and not the script between steps."""
        self.failure: BaseException | None = None
        self.execution: Execution | None = None
        self.image: Image | None = None
        self.durable: Durable | None = None
        self.verify_every = 0
        self.copy_holders: Collection[int] = _HOLDERS
        self.shards: list[str] = []
        self.shadow = Shadow(notify)
        self.describe: Callable[[], Callable[[], dict[str, Any]]] = lambda: dict
        self.started_at = 0
        self.drain = DrainOrder()
        self.prepare: Callable[[], None] = lambda: None
        self.entered = False
        """Whether set-up is over: the script has come to its first loop or step."""
        self.profiles = StepProfiles()
        self._calls = 0
        self._at_commit: list[Callable[[], object]] = []
        self.after_commit: list[Callable[[], object]] = []

    @property
    def rank(self) -> int:
        """The rank, once there is one."""
        return self.promotion.rank

    @property
    def step_index(self) -> int:
        """Committed steps; as the script found it, where it goes once more through committed ones.

        What is done every so many steps is then done in the same iterations.
        """
        before = self.replay.commits() if self.replay.is_under_way else None
        return self.commits if before is None else before

    @property
    def executing(self) -> bool:
        """Whether a step is under way."""
        return self.execution is not None

    @property
    def _others(self) -> Publication | None:
        """What waits for the other ranks, if there are any."""
        return self.publication if self.world_size > 1 else None

    def _parameters(self) -> list[torch.Tensor]:
        return [] if self.protected is None else self.protected.local_parameters()

    # ------------------------------------------------------------------ before the first step

    def protect(self, protected: Protected) -> None:
        """Take the state that must survive."""
        self.protected = protected
        if self.fabric is not None:
            self.publication = Publication(self.fabric, self.local, protected, self.notify)
        for optimizer in protected.optimizers.values():
            optimizer.register_step_pre_hook(lambda *_: self._before_update())
            optimizer.register_step_post_hook(lambda *_: self.injector.at("updated"))

    def split_state(self, table: list[str]) -> None:
        """Take note which ranks hold the same part of the state.

        Args:
            table: Shard key by rank.
        """
        self.shards = table if any(table) else []
        self.copy_holders = copy_holders(table, len(_HOLDERS))
        self.shadow.settle(table)
        if self.fabric is not None:
            self.fabric.journal.keeps_step = self.shadow.every > 0

    def expects_messages(self) -> bool:
        """Tell whether the other ranks reckon with messages between some of them now."""
        if self.publication is None or self.publication.is_always_together:
            return True
        if self.execution is None:
            return self.commits == self.started_at
        return self.execution.profile.kind is UpdateKind.UNKNOWN

    def restored(self) -> None:
        """Take note that all state is that of the last commit, and copy it if nobody has."""
        if self.commits not in self.shadow.commits():
            self.begin_shadow()

    def begin_shadow(self) -> None:
        """Copy the state of the last commit to its shadow, if one is due."""
        assert self.protected is not None
        if self.fabric is not None and self.shadow.is_due(self.commits):
            self.shadow.begin(
                self.commits,
                self.rank,
                self.describe(),
                self.local.payload,
                self.protected.replicated(),
            )

    def enter(self) -> None:
        """Leave set-up, before the first loop or step; a spare waits here for a rank."""
        if self.entered:
            return
        if self.protected is None:
            raise ConfigError(
                "run.protect was not called before the first step",
                hint="run.protect(model=model, optimizer=optimizer, loader=loader)",
            )
        self.entered = self.inside = True
        try:
            if self.fabric is not None:
                self.passes.pipelines.watch()
                self.passes.pipelines.closed = True
            self.prepare()
        finally:
            self.inside = False
        if self.replay.is_under_way:
            self.protected.keep_buffers()
        self.injector.watch(self.protected.modules.values())
        self.telemetry.enter(Phase.BETWEEN)

    def begin_at(self, commits: int, *, started_at: int) -> None:
        """Stand at `commits` committed steps, ready for the next.

        Args:
            commits: Committed steps of the job.
            started_at: Committed steps that the job resumed from.
        """
        assert self.protected is not None
        self.started_at = started_at
        self.commits = commits
        if self.fabric is not None:
            self.fabric.start_at(commits)
        self.progress["commits"] = commits
        self.protected.capture()
        seed_between(self.seed, self.rank, commits)

    def announce_ready(self, resumed: str) -> None:
        """Tell the launcher that this rank stands before its first step.

        Args:
            resumed: Where its state comes from: "shadow", "checkpoint", or nowhere.
        """
        assert self.protected is not None
        self.local.publish(
            self.protected, self.cursor.committed, self.commits, self.means.waiting, final=True
        )
        assert self.local.mirror is not None
        self.restored()
        self.notify(
            Ready(
                mirror_bytes=self.local.mirror.size_bytes,
                log_bytes=self.fabric.log_bytes()[1] if self.fabric else 0,
                state_bytes=self.protected.num_bytes(),
                resumed=resumed,
            )
        )

    # ------------------------------------------------------------------ one step

    def check_heeded(self) -> None:
        """Refuse to go on after a step that an exception ended.

        Raises:
            StepError: One did, and the script caught it.
        """
        if self.failure is not None:
            raise StepError(
                f"a step raised {type(self.failure).__name__}, and was not finished",
                hint="let the exception end the process: its rank is rebuilt, and the step is"
                " executed again there",
            ) from self.failure

    def begin(self, execution: Execution) -> None:
        """Begin to execute a step."""
        assert self.protected is not None
        if self.replay.is_under_way:  # the script took another way than before
            self.replay.finish(execution.caller)
        self.injector.at("between")
        self.protected.check_unchanged()
        execution.variables = self.local.take_variables(execution.caller, execution.position)
        seed_section(self.seed, self.rank, self.commits, self._calls)
        if execution.profile.kind >= UpdateKind.OPAQUE:
            self.shadow.wait()
            if self._holds_copies():
                self.image = self.protected.image()
        self.execution = execution
        if self.fabric is not None:
            execution.operations_before = self.fabric.num_issued()
            self.fabric.early = self._others is not None and self._others.is_always_together
        self.telemetry.begin_step(execution)
        self.injector.at("begin")

    def before_operation(self, *, spans_world: bool) -> None:
        """A collective of the open step is about to be issued."""
        execution, publication, protected = self.execution, self.publication, self.protected
        if execution is None or publication is None or protected is None or publication.waits:
            return
        if execution.stepped:
            execution.kind = max(execution.kind, UpdateKind.LATE)
            execution.meets_again |= spans_world
        else:
            self.telemetry.note_busy(execution)
            if execution.profile.kind >= UpdateKind.OPAQUE and protected.parameters_changed():
                execution.kind = UpdateKind.OPAQUE
        if self.gate.updating:
            # This step was not known to do so: for this once, its state has no spare copy.
            self.gate.end_update()
            self.notify(
                Note(
                    key="late-collective",
                    level="warning",
                    text="a collective follows the update for the first time: were a rank lost in"
                    " this very step, it would resume from the last checkpoint. run.mean(x)"
                    " reduces metrics without this",
                )
            )
        if spans_world:
            publication.before_operation(execution)

    def _before_update(self) -> None:
        execution = self.execution
        if execution is None or self.rehearsing:
            return
        self.injector.at("reduced")
        if not execution.stepped:
            self._begin_update(execution)
            execution.stepped = True
            self.telemetry.enter(Phase.UPDATING)
        self.injector.at("update")

    def _begin_update(self, execution: Execution) -> None:
        """Let nothing of the state be given away from here on, or keep a copy of it."""
        fabric, protected, others = self.fabric, self.protected, self._others
        assert protected is not None
        if self.publication is not None:
            self.publication.before_update(execution)
        if execution.profile.changes_late:
            protected.note_local_buffers()
        self.shadow.wait()
        kind = execution.profile.kind
        if fabric is not None and others is not None and others.is_together(execution):
            # No rank may commit while another still needs an operation of this step.
            fabric.drain_pending()
            fabric.early = False
            others.meet(execution, last=False)
            if execution.meets_again:
                kind = max(kind, UpdateKind.LATE)
        if kind is UpdateKind.PLAIN:
            if others is not None:
                others.wait_if_late(execution)
            if fabric is not None:
                # What is in flight may need a recovery to complete, and that the gate.
                fabric.drain_pending()
            self.gate.begin_update()
        elif kind is UpdateKind.LATE and self._holds_copies():
            self.image = protected.image()

    def complete(self, execution: Execution, value: Any) -> Any:
        """End a step: commit it, unless its gradients wait for a later one."""
        execution.value, execution.ended = value, True
        if self.fabric is not None:
            self.fabric.drain_pending()
            self.fabric.early = False
        if not self._commits_now(execution):
            self._calls += 1
            self.execution = None
            self.telemetry.leave_step()
            return value
        if self._others is not None:
            self.shadow.wait()
            self._others.before_commit(execution)
        self.gate.begin_update()
        try:
            self._commit(execution)
            # Within the gate: a recovery sees the commit with what it issues, or neither.
            self._act_at_commit()
            self.means.reduce(self.commits)
            self.begin_shadow()
        finally:
            self.gate.end_update()
        self.injector.at("commit")
        self._after_commit()
        return value

    def _commits_now(self, execution: Execution) -> bool:
        """Gradients that stay local make a step join the next one that applies them."""
        assert self.protected is not None
        if execution.stepped or self.protected.parameters_changed():
            return True
        return not self.protected.gradients_wait()

    def _commit(self, execution: Execution) -> None:
        assert self.protected is not None
        position, profile, value = execution.position, execution.profile, execution.value
        if self.durable is not None:
            self.durable.adopt(self.durable.read_poll())
        self.cursor.committed = position
        self.means.commit(execution.means)
        self.local.keep_value(position, value, self.commits + 1)
        if not execution.stepped and self.protected.parameters_changed():
            execution.kind = UpdateKind.OPAQUE
        if self.fabric is not None and self.publication is not None:
            self.publication.at_commit(execution)
            self.fabric.commit()
        kinds = (execution.kind,) if profile.kind is UpdateKind.UNKNOWN else (
            execution.kind, profile.kind
        )  # fmt: skip
        profile.kind = max(kinds)
        profile.returns = outline(value)
        self.commits += 1
        self._calls = 0
        self.protected.capture()
        self.image = None
        self.execution = None
        self.telemetry.end_step(execution, value, self.commits)

    def _after_commit(self) -> None:
        if self.drain.heed(self._stand_still):
            self.telemetry.enter(Phase.BETWEEN)
        self.follow_up()
        for action in self.after_commit:
            action()
        seed_between(self.seed, self.rank, self.commits)

    def _stand_still(self, generation: int) -> None:
        """Say that this worker stands at a commit, as it was told to in `generation`."""
        self.shadow.wait()
        self.telemetry.enter(Phase.DRAINED)
        self.notify(Drained(step=self.commits, generation=generation))

    def follow_up(self) -> None:
        """Do what belongs to the last commit and needs other ranks; a newcomer joins in here."""
        if self.commits == self.started_at:
            return
        if self.verify_every and self.commits % self.verify_every == 0 and self.world_size > 1:
            self._verify()
        if self.durable is not None:
            self.durable.after_commit()

    def _verify(self) -> None:
        assert self.protected is not None
        # Not within the gate, which a recovery needs while this waits for others. A newcomer
        # that gets state in the middle of a repair goes through the same repair afterwards.
        differ = compare_replicas(
            self.protected.replicated(),
            step=self.commits,
            shards=self.shards or [""] * self.world_size,
        )
        if differ is not None and self.rank == 0:
            self.notify(Report(event=differ.to_record()))
            self.notify(Note(key=f"corruption-{self.commits}", level="warning", text=tell(differ)))

    def at_next_commit(self, action: Callable[[], object]) -> None:
        """Call `action` at the next commit, once."""
        self._at_commit.append(action)

    def _act_at_commit(self) -> None:
        self.passes.count_commit()
        actions, self._at_commit = self._at_commit, []
        for action in actions:
            action()

    def _holds_copies(self) -> bool:
        return self.fabric is not None and self.world_size > 1 and self.rank in self.copy_holders

    def _tell_of_enumerate(self) -> None:
        self.notify(
            Note(
                key="enumerate",
                level="warning",
                text="on this interpreter enumerate(run.batches(...)) counts from 0 again in a"
                " process that takes a rank over; use run.step_index, or a count of your own",
            )
        )

    # ------------------------------------------------------------------ metrics

    def mean(self, value: torch.Tensor | float) -> LazyMean:
        """Return the average of `value` over all ranks, reduced after the commit."""
        local = value.detach() if isinstance(value, torch.Tensor) else value
        mean = LazyMean(float(local), len(self.execution.means) if self.execution else 0)
        if self.execution is None:
            if self.rehearsing:
                return mean
            raise StepError(
                "run.mean was called outside a step", hint="call it in the function under @run.step"
            )
        if len(self.execution.means) == MAX_MEANS:
            raise StepError(f"a step can reduce at most {MAX_MEANS} means")
        self.execution.means.append(mean)
        self.execution.sources.append(local)
        return mean

    def show_waiting(self, waiting: bool) -> None:
        """Say that the training thread waits in a collective, or no longer does."""
        inside = Phase.COMPUTING if self.execution is not None else Phase.BETWEEN
        self.telemetry.wait(begins=waiting, inside=inside)

    # ------------------------------------------------------------------ another process's commits

    def _return_state(self) -> int:
        assert self.protected is not None
        self.protected.return_to_commit()
        seed_between(self.seed, self.rank, self.commits)
        return self.commits

    def restore_record(self, payload: bytes, commits: int, returned: Any = None) -> None:
        """Take over the local state that a predecessor of this rank published.

        Args:
            payload: What it published.
            commits: For how many committed steps.
            returned: Outline of what the last of them returned on another rank.
        """
        assert self.protected is not None
        self.means.commit(self.local.restore(self.protected, payload, commits, returned))


def leave(code: int) -> NoReturn:
    """End this process now, without running destructors that could wait for peers."""
    os._exit(code)
