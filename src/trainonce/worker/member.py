# pyright: reportPrivateImportUsage=false
"""A process as a member of the job: joins it, hears the launcher, makes groups, and leaves."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainonce import settings
from trainonce.errors import ConfigError, RecoveryError, StepError, TrainOnceError
from trainonce.wire.messages import Done, Failed, Note
from trainonce.wire.progress import Phase
from trainonce.worker import spare, torch_private
from trainonce.worker.agreement import compare_layouts
from trainonce.worker.durable import Command, Durable
from trainonce.worker.group import BACKEND, OnceGroup, OnceWork
from trainonce.worker.handover import Handover
from trainonce.worker.runner import leave
from trainonce.worker.shadow import check_redundancy
from trainonce.worker.shards import describe_copies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainonce.wire.messages import Checkpoint, Committed, Drain, Generation
    from trainonce.worker.durable import CheckpointSettings
    from trainonce.worker.fabric import Fabric
    from trainonce.worker.link import Link
    from trainonce.worker.runner import Runner
    from trainonce.worker.sources import Sources

EXIT_LAUNCHER_LOST = 75
# How long ranks may take to finish the step and write, once the launcher is gone.
_LAUNCHER_LOST_GRACE_S = 60.0


class Member:
    """This process in a job of `trainonce run`. Its `on_…` are called on the link's thread.

    Args:
        link: The connection to the launcher.
        runner: The steps and their state.
        fabric: The groups.
        sources: The loaders, one of which a rehearsal takes a batch of.
        device: Where the model lives.
        checkpoints: When and how durable checkpoints are written.
    """

    def __init__(
        self,
        *,
        link: Link,
        runner: Runner,
        fabric: Fabric,
        sources: Sources,
        device: torch.device,
        checkpoints: CheckpointSettings,
    ) -> None:
        self.link = link
        self._runner = runner
        self._fabric = fabric
        self._promotion = runner.promotion
        self._world_size = runner.world_size
        self._device = device
        self._generation: Generation | None = None
        self._announced = threading.Event()
        self._told_to_begin = threading.Event()
        self._exit = threading.Event()
        self._exit_code = 0
        self._initialising = True
        self._handover = fabric.host = Handover(runner, fabric, sources, device)
        runner.prepare = self._prepare
        runner.injector.wait = self._wait_to_begin
        runner.describe = self._handover.describe_later
        folder = settings.home() / "jobs" / (settings.JOB.get() or "job") / "checkpoints"
        self._durable = runner.durable = Durable(
            runner, folder, checkpoints, link.send, self._leave_after_checkpoint
        )

    # ------------------------------------------------------------------ joining

    def join(self) -> None:
        """Become a member, and make torch's default group one of ours."""
        self._register_backend()
        self.link.start(self, device=_pci_address(self._device))
        if self._promotion.done:
            # The launcher answers with the membership; from there on we know the store.
            self._announced.wait()
        dist.init_process_group(
            BACKEND,
            store=dist.HashStore(),
            rank=max(self._promotion.rank, 0),
            world_size=self._world_size,
        )
        torch_private.watch_new_groups(self._note_group)
        torch_private.watch_meshes(self._explain_mesh)
        self._runner.passes.pipelines.watch()
        self._runner.progress["phase"] = Phase.SETUP
        self._initialising = False

    def _register_backend(self) -> None:
        def create(options: Any, _backend_options: Any) -> OnceGroup:
            return self._create_group(list(options.global_ranks_in_group), options.group_id)

        dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])

    def _explain_mesh(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what} (the job has {self._world_size} ranks)",
            hint=f"make the sizes of its axes multiply to {self._world_size}, or give"
            " --nproc-per-node their product",
        )

    def _note_group(self, ranks: Sequence[int]) -> None:
        self._runner.passes.pipelines.watch()  # in case that it was imported meanwhile
        if ranks and len(ranks) < self._world_size:
            # Steps complete together from here on, on all ranks alike.
            self._fabric.subgroups_elsewhere = True

    def _create_group(self, ranks: list[int], name: str) -> OnceGroup:
        """Make the group object for torch; called by its backend registry."""
        fabric, world = self._fabric, list(range(self._world_size))
        if self._initialising:
            log, members = fabric.world, world
        else:
            self._promotion.park("new_group")
            members = ranks or world
            log = fabric.add_group(f"{fabric.world.key}/{name}", members)

        def current_rank() -> int:
            if self._initialising or (not self._promotion.done and self._runner.rehearsing):
                return 0
            rank = self._promotion.park("rank")
            return members.index(rank)

        torch_private.hide_from_compiler(OnceGroup)
        torch_private.hide_from_compiler(OnceWork)
        first = 0 if not self._promotion.done else members.index(self._promotion.rank)
        return OnceGroup(
            fabric,
            log,
            first,
            current_rank=current_rank,
            emulate=self._handover.emulate,
            orders_buckets=self._runner.passes.orders_buckets,
            waiting=self._runner.show_waiting,
        )

    # ------------------------------------------------------------------ set-up

    def agree(self) -> None:
        """Make sure that all ranks protect the same, and learn who holds which part."""
        if self._handover.is_newcomer:
            return
        runner, fabric = self._runner, self._fabric
        assert runner.protected is not None
        with self._handover.in_private():
            table, subgroups = compare_layouts(
                runner.protected,
                rank=self._promotion.rank,
                world_size=self._world_size,
                subgroups=fabric.has_subgroups,
            )
        fabric.subgroups_elsewhere |= subgroups
        runner.split_state(table)
        required = int(settings.REDUNDANCY.get() or 0)
        check_redundancy(required, table, shadow=runner.shadow.every > 0)
        if any(table) and runner.rank == 0:
            runner.notify(Note(key="copies", text=describe_copies(table)))

    def _prepare(self) -> None:
        """Leave set-up: as a rank, say so; as a spare, wait to take one over."""
        if self._handover.is_newcomer:
            self._handover.take_over()
            return
        self._announced.wait()
        assert self._generation is not None
        commits, source = self._resume(self._generation.resume)
        self._runner.passes.watch({})
        self._runner.begin_at(commits, started_at=commits)
        self._durable.start_at(commits)
        self._runner.announce_ready(source)
        # Who dies from here on is rebuilt: that takes the others to have finished their set-up.
        self._wait_to_begin()
        if source:
            self._runner.means.reduce(commits)

    def _resume(self, folder: str) -> tuple[int, str]:
        """Load the newest state that there is outside the processes, if any.

        Returns:
            Its committed steps, and where it comes from.
        """
        with self._handover.in_private():
            at = self._newest_shadow()
            found = self._durable.resume(Path(folder), beyond=at) if folder else None
        if found is not None:
            commits, payload = found
            self._runner.restore_record(payload, commits)
            return commits, "checkpoint"
        if at >= 0:
            self._handover.resume_from_shadow(at)
            return at, "shadow"
        return 0, ""

    def _newest_shadow(self) -> int:
        """Return the most committed steps of which every rank has a shadow; -1 for none."""
        assert self._generation is not None
        if not self._generation.shadows:  # the launcher has those of all ranks, or none
            return -1
        mine = self._runner.shadow.commits()
        everywhere: list[Any] = [mine]
        if self._world_size > 1:
            everywhere = [None] * self._world_size
            dist.all_gather_object(everywhere, mine)
        return max(set(mine).intersection(*everywhere), default=-1)

    def _wait_to_begin(self) -> None:
        self._told_to_begin.wait()
        self._told_to_begin.clear()

    # ------------------------------------------------------------------ the launcher speaks

    def on_generation(
        self, message: Generation, mirror_fd: int | None, shadow_fd: int | None
    ) -> None:
        """Take note of a new membership, and re-form the groups."""
        self._generation = message
        self._runner.injector.arm(message.faults)
        if mirror_fd is not None:
            self._handover.adopt_mirror(mirror_fd)
        if shadow_fd is not None:
            self._handover.adopt_shadow(shadow_fd)
        if not self._promotion.done:
            spare.publish_rank(message.rank)
            self._promotion.promote(message.rank)
        self._fabric.announce(message)
        self._runner.drain.withdraw()
        self._announced.set()

    def on_begin(self) -> None:
        """Go on with the step that this rank waits before."""
        self._told_to_begin.set()

    def on_committed(self, message: Committed) -> None:
        """Take note of the job's progress, as a spare."""
        if message.step:
            self._handover.job_has_committed()

    def on_drain(self, message: Drain) -> None:
        """Stop at the next commit."""
        self._runner.drain.give(message.generation)

    def on_checkpoint(self, message: Checkpoint) -> None:
        """Write a checkpoint at one of the next commits."""
        command = Command.SAVE | (Command.STOP if message.stop else Command.NOTHING)
        self._durable.request(command, message.reason)
        if message.stop:
            self._runner.drain.withdraw()

    def on_exit(self) -> None:
        """Leave: from the end of the script, or from wherever a spare waits."""
        self._exit.set()
        if self._runner.progress["phase"] != Phase.DONE:
            leave(0)

    def on_launcher_lost(self) -> None:
        """Write a checkpoint and leave: nobody could serve a failure any more."""
        phase = self._runner.progress["phase"]
        if phase == Phase.DONE:
            self._exit.set()
            return
        if not self._promotion.done or phase <= Phase.SETUP:
            leave(EXIT_LAUNCHER_LOST)
        if phase == Phase.ENDING:
            self._exit.set()  # it writes its last checkpoint as it is
        self._exit_code = EXIT_LAUNCHER_LOST
        self._told_to_begin.set()
        self._durable.request(Command.SAVE | Command.STOP, "launcher lost")
        self._runner.drain.withdraw()
        timer = threading.Timer(_LAUNCHER_LOST_GRACE_S, leave, (EXIT_LAUNCHER_LOST,))
        timer.daemon = True
        timer.start()

    def _leave_after_checkpoint(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        leave(self._exit_code)

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """Say that the script is over, and stay as a donor until all are."""
        self._promotion.park("end")
        self._runner.enter()
        self._runner.check_heeded()
        self._fabric.drain_pending()
        self._runner.progress["phase"] = Phase.ENDING
        self._runner.injector.at("end")
        self._durable.save_at_end()
        self._runner.progress["phase"] = Phase.DONE
        self.link.send(Done(step=self._runner.commits))
        self._exit.wait()

    def report_failure(self, error: BaseException) -> None:
        """Tell the launcher which exception ended the script."""
        missing = isinstance(error, NameError | TypeError | AttributeError)
        if missing and self._handover.skips:
            self.link.send(
                Note(
                    key="variables",
                    level="warning",
                    text="a process that takes a rank over goes through the last iteration of"
                    " completed loops only: what else they gather belongs in run.state",
                )
            )
        if (lost_at := self._runner.replay.lost_at) is not None:
            self.link.send(
                Note(
                    key="value-lost",
                    level="warning",
                    text=f"what step {lost_at} returned went down with a process, and the script"
                    " got trainonce.LOST, a NaN, in its place before it failed. What it must have"
                    " of a step belongs in run.state, set in that step",
                )
            )
        self.link.send(
            Failed(
                step=self._runner.commits,
                in_section=self._runner.executing,
                error_type=type(error).__qualname__,
                error=getattr(error, "message", str(error))[:2000],
                traceback="".join(traceback.format_exception(error))[-20000:],
                cause=_cause(error, taking_over=self._handover.is_newcomer or self._handover.skips),
            )
        )


def _cause(error: BaseException, *, taking_over: bool) -> str:
    """Return what an exception is as the cause of an incident."""
    if isinstance(error, StepError) and error.__cause__ is not None:
        # What the step before raised, and the script did not heed.
        return _cause(error.__cause__, taking_over=taking_over)
    if not isinstance(error, TrainOnceError) or isinstance(error.__cause__, OSError):
        return "exception"
    if isinstance(error, RecoveryError) or taking_over:  # the process before came along there
        return "recovery"
    return "misuse" if error.misuse else "exception"


def _pci_address(device: torch.device) -> str:
    """Return where a GPU sits, as health signals name it; empty for a CPU."""
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)
    try:
        return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}"
    except AttributeError:  # an older torch: the launcher then cannot tell whose GPU is failing
        return ""
