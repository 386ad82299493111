# pyright: reportPrivateImportUsage=false
"""`trainonce.init()` and the `Run` it returns: what a training script sees."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist

from trainonce import settings
from trainonce.errors import ConfigError
from trainonce.events import LeverApplied
from trainonce.wire.messages import Report
from trainonce.wire.progress import Progress
from trainonce.worker.agreement import compare_layouts
from trainonce.worker.data import StatefulLoader
from trainonce.worker.durable import CheckpointSettings
from trainonce.worker.fabric import Fabric
from trainonce.worker.link import Link
from trainonce.worker.loader import ShardedLoader
from trainonce.worker.member import Member
from trainonce.worker.observe import LightProfile, LoaderAdvice
from trainonce.worker.peaks import peak_flops
from trainonce.worker.runner import Runner
from trainonce.worker.shards import ranks_of
from trainonce.worker.sources import Sources
from trainonce.worker.spare import Promotion
from trainonce.worker.state import Protected
from trainonce.worker.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping

    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils.data import Dataset

    from trainonce.worker.values import LazyMean

P = ParamSpec("P")
R = TypeVar("R")


class Run:
    """One training run, from the view of one process.

    Made by `trainonce.init`. Under `trainonce run` its steps survive failures; under
    `python` and `torchrun` the same script runs with nothing to recover from.

    Attributes:
        state: Values of the script's own that must survive, such as the best metric so far:
            a mapping of plain values and tensors. It differs by rank.
    """

    def __init__(self, *, seed: int, link: Link | None, checkpoints: CheckpointSettings) -> None:
        if dist.is_initialized():
            raise ConfigError(
                "torch.distributed is initialised already",
                hint="call trainonce.init() instead of dist.init_process_group()",
            )
        self.seed = seed
        self._link = link
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        progress = link.progress if link else Progress.create_private()
        self._notify = link.send if link else (lambda _message: None)
        self._promotion = Promotion(self._notify, progress)
        if link is None or not link.spare:
            self._promotion.promote(int(os.environ.get("RANK", "0")))
        self._fabric = Fabric(self._world_size, progress, self._notify) if link else None
        self._runner = Runner(
            seed=seed,
            world_size=self._world_size,
            promotion=self._promotion,
            progress=progress,
            fabric=self._fabric,
            notify=self._notify,
        )
        self.state: MutableMapping[str, Any] = self._runner.local.user
        self._sources = Sources(
            seed, self._world_size, self._promotion, lambda: self._runner.entered
        )
        self._device = _choose_device(launched=link is not None)
        progress["peak_flops"] = peak_flops(self._device)
        self._member: Member | None = None
        self._advice: LoaderAdvice | None = None
        if link is None or self._fabric is None:
            _join_plainly(self._device, self._world_size)
            return
        self._member = Member(
            link=link,
            runner=self._runner,
            fabric=self._fabric,
            sources=self._sources,
            device=self._device,
            checkpoints=checkpoints,
        )
        self._advice = LoaderAdvice(
            lambda: self._runner.loops.waited_ns, lambda: self._promotion.rank, self._notify
        )
        self._runner.after_commit.append(self._advice.after_commit)
        if seconds := _profile_s():
            profile = LightProfile(
                seconds, self._runner.loops, lambda: self._promotion.rank, self._notify
            )
            self._runner.after_commit.append(profile.after_commit)
        self._member.join()

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
        return self._runner.step_index

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
        if shadow_every is not None and shadow_every < 0:
            raise ConfigError(f"shadow_every is {shadow_every}", hint="give 0 or more, or None")
        if verify_replicas_every < 0:
            raise ConfigError(
                f"verify_replicas_every is {verify_replicas_every}",
                hint="give 0 for never, or more",
            )
        objects, loaders = _without_loaders(objects)
        protected = Protected(objects)
        if replicas is not None:
            protected.replicas = ranks_of(replicas, protected.parameters())
        self._runner.protect(protected)
        self._runner.verify_every = verify_replicas_every
        for loader in loaders:
            self._sources.add(loader, sys._getframe(1))
        self._runner.shadow.wanted = shadow_every
        if self._member is not None:
            self._member.agree()
        else:
            rank, size = self._promotion.rank, self._world_size
            compare_layouts(protected, rank=rank, world_size=size, subgroups=False)

    def step(self, function: Callable[P, R]) -> Step[P, R]:
        """Mark a function whose calls are exactly once. Use as a decorator.

        Each call is one step: it ends in a commit, after which it is never executed again. A
        step whose gradients stay local (`no_sync`) joins the next one that applies them.
        """
        step = Step(self._runner, function)
        if not self._runner.entered:
            self._runner.steps.append(step)
        return step

    def batches(self, loader: Any, *, max_steps: int | None = None) -> Iterator[Any]:
        """Iterate over `loader`, from the first batch that is not consumed yet.

        Args:
            loader: From `run.dataloader`, or another that can say where it stands.
            max_steps: Stop after so many batches, going over the data again if need be.
                None: one pass.
        """
        caller = sys._getframe(1)
        key, source = self._sources.add(loader, caller), self._sources.adapt(loader, caller)
        if not self._runner.rehearsing:
            self._runner.enter()
        source.bind(self._promotion.rank, self._world_size)
        return self._runner.loops.batches(source, key, max_steps)

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
        self._runner.telemetry.count(tokens, flops, peak_flops)

    def expect_saving(self, lever: str, share: float, *, basis: str) -> None:
        """Say that a lever is on, for the report: what it is *expected* to save.

        Args:
            lever: Its name.
            share: Share of the job's compute, at least 0 and below 1.
            basis: Where the expectation comes from, such as a result of `trainonce bench levers`.

        Raises:
            ConfigError: `share` is below 0, or 1 and more.
        """
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"share is {share!r}", hint="give at least 0 and less than 1")
        if self._link is not None and self._promotion.done and self._promotion.rank == 0:
            event = LeverApplied(lever=lever, expected_share=float(share), basis=basis)
            self._notify(Report(event=event.to_record()))

    def dataloader(
        self, dataset: Dataset[Any], batch_size: int = 1, shuffle: bool = False, **options: Any
    ) -> ShardedLoader:
        """Return a loader of this rank's share of `dataset`, resumable at any step.

        Takes the options of `torch.utils.data.DataLoader`; see docs/data.md.
        """
        loader = ShardedLoader(
            dataset,
            batch_size,
            shuffle,
            seed=self.seed,
            world_size=self._world_size,
            rank=self._sources.rank,
            **options,
        )
        self._sources.add(loader, sys._getframe(1))
        if self._advice is not None:
            self._advice.watch(loader.times)
        return loader

    # ------------------------------------------------------------------ for the runtime itself

    @property
    def link(self) -> Link | None:
        """The connection to the launcher; None under `python` and `torchrun`."""
        return self._link

    def finish(self) -> None:
        """Say that the script is over, and stay as a donor until all are."""
        if self._member is not None:
            self._member.finish()

    def report_failure(self, error: BaseException) -> None:
        """Tell the launcher which exception ended the script."""
        if self._member is not None:
            self._member.report_failure(error)


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


def _profile_s() -> float:
    try:
        return max(0.0, float(settings.PROFILE_S.get() or 0))
    except ValueError:
        raise ConfigError(
            f"{settings.PROFILE_S.name} is {settings.PROFILE_S.get()!r}", hint="give seconds"
        ) from None


def _choose_device(*, launched: bool) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Under the launcher a process uses the device of its slot, whichever rank it holds. With
    # more slots than devices, some share one.
    slot = settings.SLOT.get() if launched else None
    number = int(slot or os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _join_plainly(device: torch.device, world_size: int) -> None:
    """Join the other ranks without a launcher of ours: nothing survives."""
    backend = "gloo"
    if device.type == "cuda" and torch.cuda.device_count() >= world_size:
        backend = "nccl"
    if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _leave_plainly() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_source(value: object) -> bool:
    return isinstance(value, ShardedLoader | StatefulLoader | torch.utils.data.DataLoader)


def _without_loaders(objects: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return what was registered without the loaders, and these; also from lists and dicts."""
    rest: dict[str, Any] = {}
    loaders: list[Any] = []
    for name, value in objects.items():
        if _is_source(value):
            loaders.append(value)
        elif hasattr(value, "state_dict"):
            rest[name] = value
        elif isinstance(value, Mapping):
            rest[name], found = _without_loaders(cast("Mapping[str, Any]", value))
            loaders += found
        elif type(value) in (list, tuple):
            rest[name], found = _without_loaders({str(i): each for i, each in enumerate(value)})
            loaders += found
        else:
            rest[name] = value
    return rest, loaders
