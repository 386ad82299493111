# pyright: reportPrivateImportUsage=false
"""`trainonce.init()` and the `Run` it returns: what a training script sees."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from trainonce import settings
from trainonce.errors import ConfigError, StateMismatchError, TrainOnceError
from trainonce.events import LeverApplied
from trainonce.wire.messages import Done, Failed, Note, Report
from trainonce.wire.progress import Phase, Progress
from trainonce.worker import spare, torch_private
from trainonce.worker.data import StatefulLoader, adapt_loader
from trainonce.worker.durable import CheckpointSettings, Command, Durable
from trainonce.worker.fabric import Fabric
from trainonce.worker.group import BACKEND, OnceGroup
from trainonce.worker.handover import Handover
from trainonce.worker.link import Link
from trainonce.worker.loader import ShardedLoader
from trainonce.worker.observe import LightProfile, LoaderAdvice
from trainonce.worker.peaks import peak_flops
from trainonce.worker.runner import Runner, leave
from trainonce.worker.shadow import check_redundancy
from trainonce.worker.shards import check_replicas, describe_copies, ranks_of
from trainonce.worker.spare import Promotion
from trainonce.worker.state import Protected
from trainonce.worker.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils.data import Dataset

    from trainonce.wire.messages import Checkpoint, Committed, Generation
    from trainonce.worker.values import LazyMean

P = ParamSpec("P")
R = TypeVar("R")

EXIT_LAUNCHER_LOST = 75
# How long ranks may take to finish the step and write, once the launcher is gone.
_LAUNCHER_LOST_GRACE_S = 60.0


class Run:
    """One training run, from the view of one process.

    Made by `trainonce.init`. Under `trainonce run` its steps survive failures; under
    `python` and `torchrun` the same script runs with nothing to recover from.

    Attributes:
        state: Values of the script's own that must survive, such as the best metric so far:
            a mapping of plain values and tensors. It differs by rank.
    """

    def __init__(self, *, seed: int, link: Link | None, checkpoints: CheckpointSettings) -> None:
        self.seed = seed
        self._link = link
        self.state: MutableMapping[str, Any] = {}
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        progress = link.progress if link else Progress.create_private()
        notify = link.send if link else (lambda _message: None)
        self._promotion = Promotion(notify, progress)
        if link is None or not link.spare:
            self._promotion.promote(int(os.environ.get("RANK", "0")))
        self._fabric = Fabric(self._world_size, progress, notify) if link else None
        self._runner = Runner(
            seed=seed,
            world_size=self._world_size,
            promotion=self._promotion,
            progress=progress,
            fabric=self._fabric,
            notify=notify,
        )
        self._runner.local.user = self.state  # one mapping, two views
        self._generation: Generation | None = None
        self._announced = threading.Event()
        self._exit = threading.Event()
        self._exit_code = 0
        self._initialising = True
        self._device = self._choose_device()
        progress["peak_flops"] = peak_flops(self._device)
        self._handover: Handover | None = None
        self._sources: dict[int, tuple[Any, ShardedLoader | StatefulLoader]] = {}
        self._ordinals: dict[int, int] = {}
        if self._fabric is not None:
            self._handover = Handover(self._runner, self._fabric, self._device)
            self._fabric.host = self._handover
            self._runner.prepare = self._prepare
            self._runner.describe = self._handover.describe_later
            self._runner.pipelines = self._handover.pipelines
            self._runner.local.passes = self._handover.passes
            self._runner.passes_return_to_commit = self._handover.return_to_commit
            self._runner.pass_over = self._handover.pass_over
            job = settings.JOB.get() or "job"
            self._runner.durable = Durable(
                self._runner,
                settings.home() / "jobs" / job / "checkpoints",
                checkpoints,
                notify,
                self._leave_after_checkpoint,
            )
        if link is not None and (seconds := _profile_s()):
            profile = LightProfile(
                seconds, self._runner.loops, lambda: self._promotion.rank, notify
            )
            self._runner.after_commit.append(profile.after_commit)
        self._join()
        self._initialising = False

    # ------------------------------------------------------------------ who and where

    @property
    def rank(self) -> int:
        """Rank of this process. In a hot spare, reading it waits for a promotion."""
        return self._promotion.park("rank")

    @property
    def world_size(self) -> int:
        """Number of ranks; constant for the run."""
        return self._world_size

    @property
    def device(self) -> torch.device:
        """The device this process should use."""
        return self._device

    @property
    def step_index(self) -> int:
        """Number of committed steps."""
        return self._runner.commits

    @property
    def rehearsing(self) -> bool:
        """Whether a hot spare is warming up: what a step does now is undone afterwards."""
        return self._runner.rehearsing

    # ------------------------------------------------------------------ what the script says

    def protect(
        self,
        *,
        replicas: DeviceMesh | dist.ProcessGroup | None = None,
        verify_replicas_every: int = 0,
        shadow_every: int | None = None,
        **objects: Any,
    ) -> None:
        """Register what must survive. Call it once, after everything is built.

        Collective: every rank must register the same, or, with `replicas`, the same as those.

        Args:
            replicas: The ranks that hold the same state as this one, or parts of the same
                DTensors, where not all ranks do: those of its stage of a pipeline, that is,
                the axes of the mesh other than the pipeline's. None: all ranks.
            verify_replicas_every: Compare the replicated state of all ranks every so many
                steps, against silent data corruption: what differs from the majority is
                named, repaired and put in the ledger; with two ranks it is reported. 0: never.
            shadow_every: Keep a copy of this rank's state in memory outside the process, and
                refresh it after every so many steps: 1 loses none. 0: never. None: after every
                step where some part of the state has no copy on another rank.
            **objects: Modules (wrapped in DDP or not), optimizers, schedulers, gradient
                scalers, loaders, anything with `state_dict` and `load_state_dict`, or lists
                and dicts of these.

        Raises:
            ConfigError: Called twice, or with something that cannot be protected, or ranks do
                not agree about who holds the same.
            StateMismatchError: Ranks registered different things; names the first.
        """
        if self._runner.protected is not None:
            raise ConfigError(
                "run.protect was called twice", hint="register everything in one call"
            )
        loaders = {name: value for name, value in objects.items() if _is_source(value)}
        protected = Protected({k: v for k, v in objects.items() if k not in loaders})
        if replicas is not None:
            protected.replicas = ranks_of(replicas, protected.parameters())
        self._runner.protect(protected)
        self._runner.verify_every = verify_replicas_every
        for loader in loaders.values():
            self._number(loader)
            self._use_for_rehearsal(loader)
        if shadow_every is not None and shadow_every < 0:
            raise ConfigError(f"shadow_every is {shadow_every}", hint="give 0 or more, or None")
        self._runner.shadow.wanted = shadow_every
        self._compare_layouts(protected.layout())

    def step(self, function: Callable[P, R]) -> Step[P, R]:
        """Mark a function whose calls are exactly once. Use as a decorator.

        Each call is one step: it ends in a commit, after which it is never executed again. A
        step whose gradients stay local (`no_sync`) joins the next one that applies them.
        """
        step = Step(self._runner, function)
        self._runner.steps.append(step)
        return step

    def batches(self, loader: Any, *, max_steps: int | None = None) -> Iterator[Any]:
        """Iterate over `loader`, from the first batch that is not consumed yet.

        Args:
            loader: From `run.dataloader`, or another that can say where it stands.
            max_steps: Stop after so many batches, going over the data again if need be.
                None: one pass.
        """
        source = self._source(loader)
        return self._runner.loops.batches(source, self._ordinals[id(loader)], max_steps)

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Iterate over the epochs that are not completed yet."""
        return self._runner.loops.epochs(num_epochs)

    def mean(self, value: torch.Tensor | float) -> LazyMean:
        """Return the average of `value` over all ranks, reduced after the commit.

        The way to log a metric: it adds nothing between the update and the commit. For use
        inside a step; read it with `float(...)` afterwards.
        """
        return self._runner.mean(value)

    def count(self, *, tokens: int = 0, flops: int = 0, peak_flops: int | None = None) -> None:
        """Say how much the present step processes on this rank, for the progress line.

        Args:
            tokens: How many.
            flops: Floating-point operations.
            peak_flops: What this rank's device does per second at best, for the utilisation
                (MFU). None: its dense bf16 peak if the device is a known GPU.
        """
        self._runner.count(tokens, flops, peak_flops)

    def expect_saving(self, lever: str, share: float, *, basis: str) -> None:
        """Say that a lever is on, for the report: what it is *expected* to save.

        Args:
            lever: Its name.
            share: Share of the job's compute, at least 0 and below 1.
            basis: Where the expectation comes from, such as a result of `trainonce bench levers`.

        Raises:
            ConfigError: `share` is none.
        """
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"share is {share!r}", hint="give at least 0 and less than 1")
        if self._link is not None and self._promotion.done and self._promotion.rank == 0:
            event = LeverApplied(lever=lever, expected_share=float(share), basis=basis)
            self._link.send(Report(event=event.to_record()))

    def dataloader(
        self, dataset: Dataset[Any], batch_size: int = 1, shuffle: bool = False, **options: Any
    ) -> ShardedLoader:
        """Return a loader of this rank's share of `dataset`, resumable at any step.

        Takes the options of `torch.utils.data.DataLoader`; see docs/data.md.
        """
        loader = self._observed(
            ShardedLoader(
                dataset,
                batch_size,
                shuffle,
                seed=self.seed,
                world_size=self._world_size,
                rank=self._promotion.rank if self._promotion.done else None,
                **options,
            )
        )
        self._number(loader)
        self._use_for_rehearsal(loader)
        return loader

    def _observed(self, loader: ShardedLoader) -> ShardedLoader:
        if self._link is not None:
            loops = self._runner.loops
            advice = LoaderAdvice(
                loader.times, lambda: loops.waited_ns, lambda: self._promotion.rank, self._link.send
            )
            self._runner.after_commit.append(advice.after_commit)
        return loader

    # ------------------------------------------------------------------ joining

    def _choose_device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Under the launcher a process uses the device of its slot, whichever rank it holds. With
        # more slots than devices, some share one.
        slot = settings.SLOT.get() if self._link is not None else None
        number = int(slot or os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def _join(self) -> None:
        if dist.is_initialized():
            raise ConfigError(
                "torch.distributed is initialised already",
                hint="call trainonce.init() instead of dist.init_process_group()",
            )
        if self._link is None:
            self._join_plainly()
            return
        _register_backend(self)
        self._link.start(self, device=_pci_address(self._device))
        if self._promotion.done:
            # The launcher answers with the membership; from there on we know the store.
            self._announced.wait()
        store = dist.HashStore()
        dist.init_process_group(
            BACKEND,
            store=store,
            rank=max(self._promotion.rank, 0),
            world_size=self._world_size,
        )
        torch_private.watch_new_groups(self._note_group)
        torch_private.watch_meshes(self._explain_mesh)
        assert self._runner.pipelines is not None
        self._runner.pipelines.watch()
        self._runner.progress["phase"] = Phase.SETUP

    def _explain_mesh(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what} (the job has {self._world_size} ranks)",
            hint=f"make the sizes of its axes multiply to {self._world_size}, or give"
            " --nproc-per-node their product",
        )

    def _note_group(self, ranks: Sequence[int]) -> None:
        assert self._fabric is not None
        assert self._runner.pipelines is not None
        self._runner.pipelines.watch()  # in case that it was imported meanwhile
        if ranks and len(ranks) < self._world_size:
            # Steps complete together from here on, on all ranks alike.
            self._fabric.subgroups_elsewhere = True

    def _join_plainly(self) -> None:
        backend = "gloo"
        if self._device.type == "cuda" and torch.cuda.device_count() >= self._world_size:
            backend = "nccl"
        if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def create_group(self, ranks: list[int], name: str) -> OnceGroup:
        """Make the group object for torch; called by its backend registry."""
        assert self._fabric is not None
        assert self._handover is not None
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

        first = 0 if not self._promotion.done else members.index(self._promotion.rank)
        return OnceGroup(
            fabric,
            log,
            first,
            current_rank=current_rank,
            emulate=self._handover.emulate,
            orders_buckets=self._handover.orders_buckets,
            waiting=self._runner.show_waiting,
        )

    def _prepare(self) -> None:
        """Leave set-up: as a rank, say so; as a spare, wait to take one over."""
        assert self._fabric is not None
        assert self._handover is not None
        if self._handover.is_newcomer:
            self._handover.take_over()
            return
        self._announced.wait()
        assert self._generation is not None
        assert self._runner.protected is not None
        commits, source = self._resume(self._generation.resume)
        self._handover.take_turns()
        self._handover.watch_passes({})
        self._runner.begin_at(commits, started_at=commits)
        if self._runner.durable is not None:
            self._runner.durable.start_at(commits)
        self._runner.announce_ready(source)

    def _resume(self, folder: str) -> tuple[int, str]:
        """Load the newest state that there is outside the processes, if any.

        Returns:
            Its committed steps, and where it comes from.
        """
        durable, handover = self._runner.durable, self._handover
        assert handover is not None
        handover.private = True
        try:
            at = self._newest_shadow()
            found = durable.resume(Path(folder), beyond=at) if durable and folder else None
        finally:
            handover.private = False
        if found is not None:
            commits, payload = found
            self._runner.restore_record(payload, commits)
            return commits, "checkpoint"
        if at >= 0:
            handover.resume_from_shadow(at)
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

    def _compare_layouts(self, layout: list[str]) -> None:
        """Tell ranks that registered different things what differs."""
        handover = self._handover
        if handover is not None and handover.is_newcomer:
            return
        if self._world_size == 1:
            self._settle_copies([""])
            return
        protected = self._runner.protected
        assert protected is not None
        everywhere: list[Any] = [None] * self._world_size
        if handover is not None:
            handover.private = True
        try:
            subgroups = self._fabric is not None and self._fabric.has_subgroups
            key = protected.shard_key(self._promotion.rank)
            dist.all_gather_object(everywhere, (layout, subgroups, key, protected.replicas))
        finally:
            if handover is not None:
                handover.private = False
        if self._fabric is not None:
            self._fabric.subgroups_elsewhere |= any(subgroups for _, subgroups, *_ in everywhere)
        check_replicas([replicas for *_, replicas in everywhere])
        for other in protected.replicas or range(self._world_size):
            # In order: the same mistake is to be known by the same words when it is met again.
            for different in sorted(set(layout).symmetric_difference(everywhere[other][0])):
                raise StateMismatchError(
                    f"ranks {self._promotion.rank} and {other} registered different state:"
                    f" {different}",
                    hint="build the same model and optimizer on every rank before run.protect; of"
                    " a pipeline's stages, say which ranks hold the same:"
                    ' run.protect(..., replicas=mesh["replicate"])',
                )
        self._settle_copies([key for _, _, key, _ in everywhere])

    def _settle_copies(self, table: list[str]) -> None:
        """Take note which ranks hold the same; keep shadows where that is nobody else."""
        if self._fabric is None:
            return
        runner = self._runner
        runner.split_state(table)
        check_redundancy(int(settings.REDUNDANCY.get() or 0), table, shadow=runner.shadow.every > 0)
        if any(table) and runner.rank == 0:
            runner.notify(Note(key="copies", text=describe_copies(table)))

    def _source(self, loader: Any) -> Any:
        self._number(loader)
        # The loader is kept with its source: an id may be used again once its object is gone.
        if id(loader) not in self._sources:
            rank = self._promotion.rank if self._promotion.done else None
            adapted = adapt_loader(loader, seed=self.seed, world_size=self._world_size, rank=rank)
            self._sources[id(loader)] = (loader, adapted)
        _, source = self._sources[id(loader)]
        if not self._runner.rehearsing:
            self._runner.enter()
        source.bind(self._promotion.rank, self._world_size)
        return source

    def _number(self, loader: Any) -> None:
        """Give a loader a number: at set-up, where a newcomer gives it the same."""
        self._ordinals.setdefault(id(loader), len(self._ordinals))

    def _use_for_rehearsal(self, loader: Any) -> None:
        handover = self._handover
        if handover is not None and handover.sample is None and hasattr(loader, "sample_batch"):
            handover.sample = loader.sample_batch

    # ------------------------------------------------------------------ the launcher speaks

    def on_generation(
        self, message: Generation, mirror_fd: int | None, shadow_fd: int | None
    ) -> None:
        """Take note of a new membership, and re-form the groups."""
        assert self._fabric is not None
        assert self._handover is not None
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
        self._announced.set()

    def on_committed(self, message: Committed) -> None:
        """Take note of the job's progress, as a spare."""
        if message.step and self._handover is not None:
            self._handover.job_has_committed()

    def on_drain(self) -> None:
        """Stop at the next commit."""
        self._runner.drain_requested.set()

    def on_checkpoint(self, message: Checkpoint) -> None:
        """Write a checkpoint at one of the next commits."""
        if self._runner.durable is not None:
            command = Command.SAVE | (Command.STOP if message.stop else Command.NOTHING)
            self._runner.durable.request(command, message.reason)

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
        durable = self._runner.durable
        if durable is None or not self._promotion.done or phase <= Phase.SETUP:
            leave(EXIT_LAUNCHER_LOST)
        self._exit_code = EXIT_LAUNCHER_LOST
        durable.request(Command.SAVE | Command.STOP, "launcher lost")
        threading.Timer(_LAUNCHER_LOST_GRACE_S, leave, (EXIT_LAUNCHER_LOST,)).start()

    def _leave_after_checkpoint(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        leave(self._exit_code)

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """Say that the script is over, and stay as a donor until all are."""
        if self._link is None:
            return
        self._promotion.park("end")
        if self._fabric is not None:
            self._runner.enter()
            self._fabric.drain_pending()
        self._runner.progress["phase"] = Phase.ENDING
        self._runner.injector.at("end")
        if self._runner.durable is not None:
            self._runner.durable.save_at_end()
        self._runner.progress["phase"] = Phase.DONE
        self._link.send(Done(step=self._runner.commits))
        self._exit.wait()

    def report_failure(self, error: BaseException) -> None:
        """Tell the launcher which exception ended the script."""
        if self._link is None:
            return
        missing = isinstance(error, NameError | TypeError | AttributeError)
        if missing and self._handover is not None and self._handover.skips:
            self._link.send(
                Note(
                    key="variables",
                    level="warning",
                    text="a process that takes a rank over goes through the last iteration of"
                    " completed loops only: what else they gather belongs in run.state",
                )
            )
        self._link.send(
            Failed(
                step=self._runner.commits,
                in_section=self._runner.executing,
                error_type=type(error).__qualname__,
                error=getattr(error, "message", str(error))[:2000],
                traceback="".join(traceback.format_exception(error))[-20000:],
                misuse=isinstance(error, TrainOnceError) and isinstance(error, ValueError),
            )
        )

    @property
    def link(self) -> Link | None:
        """The connection to the launcher; None under `python` and `torchrun`."""
        return self._link


_current: Run | None = None


def init(
    *,
    seed: int = 0,
    checkpoint_every_s: float | None = None,
    keep_checkpoints: int = 3,
    checkpoint_parameter_dtype: torch.dtype | None = None,
) -> Run:
    """Join the job that launched this process; alone, it is a job of one.

    Takes the place of `torch.distributed.init_process_group`.

    Args:
        seed: All random generators of the run are derived from it: at every step those of
            Python, NumPy and torch are set from (seed, rank, step).
        checkpoint_every_s: Seconds between durable checkpoints under `trainonce run`. None:
            Young's interval from what a checkpoint is measured to cost.
        keep_checkpoints: How many of them to keep.
        checkpoint_parameter_dtype: Store the parameters in this narrower dtype. A resume is
            then not exact; the optimizer's state is never narrowed.

    Raises:
        ConfigError: Called twice, or after `init_process_group`.
    """
    global _current
    if _current is not None:
        raise ConfigError("trainonce.init was called twice in one process")
    checkpoints = CheckpointSettings(
        every_s=checkpoint_every_s,
        keep_last=keep_checkpoints,
        parameter_dtype=checkpoint_parameter_dtype,
    )
    _current = Run(seed=seed, link=Link.inherited(), checkpoints=checkpoints)
    if _current.link is None:
        atexit.register(_leave_plainly)
    return _current


def current() -> Run | None:
    """Return the run of this process, if `init` was called."""
    return _current


def _pci_address(device: torch.device) -> str:
    """Return where a GPU sits, as health signals name it; empty for a CPU."""
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)
    try:
        return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}"
    except AttributeError:  # an older torch: the launcher then cannot tell whose GPU is failing
        return ""


def _profile_s() -> float:
    try:
        return max(0.0, float(settings.PROFILE_S.get() or 0))
    except ValueError:
        raise ConfigError(
            f"{settings.PROFILE_S.name} is {settings.PROFILE_S.get()!r}", hint="give seconds"
        ) from None


def _leave_plainly() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _register_backend(run: Run) -> None:
    def create(options: Any, _backend_options: Any) -> OnceGroup:
        ranks = list(options.global_ranks_in_group)
        return run.create_group(ranks, options.group_id)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])


def _is_source(value: object) -> bool:
    return isinstance(value, ShardedLoader | StatefulLoader | torch.utils.data.DataLoader)
