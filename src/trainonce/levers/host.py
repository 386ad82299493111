"""Where `fit` runs: on the exactly-once runtime, or in a plain process that can be resumed."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trainonce import settings
from trainonce.errors import ConfigError, StateMismatchError
from trainonce.levers.plan_file import Plan, read_plan
from trainonce.wire import encoding
from trainonce.worker import session
from trainonce.worker.loader import ShardedLoader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping
    from pathlib import Path

_STATE_FILE = "state.t1e"


class Host(Protocol):
    """What a training loop needs of the place where it runs.

    Attributes:
        world_size: Number of ranks.
        device: Where to train.
        folder: For what the run writes.
        local: Values that survive, and differ by rank.
    """

    world_size: int
    device: torch.device
    folder: Path
    local: MutableMapping[str, Any]

    @property
    def rank(self) -> int:
        """Rank of this process."""
        ...

    def dataloader(self, dataset: Any, batch_size: int, **options: Any) -> Any:
        """Return a loader of this rank's share, resumable at any step."""
        ...

    def protect(self, **objects: Any) -> None:
        """Register what must survive."""
        ...

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a function whose calls are exactly once."""
        ...

    def batches(self, loader: Any, *, max_steps: int) -> Iterator[Any]:
        """Yield batches, from the first that is not consumed."""
        ...

    def save(self) -> None:
        """Keep the state, where the host itself does not."""
        ...


class RunHost:
    """The exactly-once runtime, which keeps the state by itself.

    Args:
        run: Of `trainonce.init`.
        folder: For what the run writes.
    """

    def __init__(self, run: session.Run, folder: Path) -> None:
        self._run = run
        self.folder = folder
        self.local = run.state
        self.world_size = run.world_size
        self.device = run.device
        self.dataloader = run.dataloader
        self.protect = run.protect
        self.step: Callable[..., Any] = run.step
        self.batches = run.batches

    @property
    def rank(self) -> int:
        """Rank of this process; 0 in a hot spare that rehearses, instead of waiting for one."""
        return 0 if self._run.rehearsing else self._run.rank

    def save(self) -> None:
        """Do nothing: the runtime keeps the state, and checkpoints it."""


class PlainHost:
    """One plain process. Its state is a file, from which the next call goes on.

    Args:
        seed: Of order and generators.
        folder: Of the state and what else the run writes.
    """

    def __init__(self, *, seed: int, folder: Path) -> None:
        self.world_size, self.rank = 1, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = folder
        self.local: MutableMapping[str, Any] = {}
        self._seed = seed
        self._epoch = self._offset = self._taken = 0
        self._objects: dict[str, Any] = {}

    def dataloader(self, dataset: Any, batch_size: int, **options: Any) -> ShardedLoader:
        """Return a loader of all the data."""
        return ShardedLoader(dataset, batch_size, seed=self._seed, world_size=1, rank=0, **options)

    def protect(self, **objects: Any) -> None:
        """Register what is saved, and load it if there is a file.

        Raises:
            StateMismatchError: The file holds other things than these.
        """
        self._objects = {k: v for k, v in objects.items() if not isinstance(v, ShardedLoader)}
        path = self.folder / _STATE_FILE
        if not path.exists():
            return
        saved = encoding.decode(path.read_bytes())
        if saved["objects"].keys() != self._objects.keys():
            raise StateMismatchError(
                f"{path} holds {sorted(saved['objects'])}, and this run {sorted(self._objects)}",
                hint="go on with the same model, optimizer and plan, or give another folder",
            )
        for name, value in saved["objects"].items():
            self._objects[name].load_state_dict(value)
        self._epoch, self._offset, self._taken = saved["at"]
        self.local.update(saved["local"])

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` itself: between two files, a step is repeated if the process dies."""
        return function

    def batches(self, loader: ShardedLoader, *, max_steps: int) -> Iterator[Any]:
        """Yield batches, over and over the data, until there were `max_steps`."""
        while self._taken < max_steps:
            for batch, after in loader.iterate(self._epoch, self._offset):
                self._offset = after
                self._taken += 1
                yield batch
                if self._taken >= max_steps:
                    return
            self._epoch, self._offset = self._epoch + 1, 0

    def save(self) -> None:
        """Write the state, whole or not at all. Call it between steps."""
        state = {
            "objects": {name: value.state_dict() for name, value in self._objects.items()},
            "local": dict(self.local),
            "at": [self._epoch, self._offset, self._taken],
        }
        target = self.folder / _STATE_FILE
        partial = target.with_suffix(".part")
        with partial.open("wb") as file:
            file.write(encoding.encode(state))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)


def open_host(*, seed: int, folder: Path | None) -> Host:
    """Return the runtime where this process is part of a job, else a plain process.

    Raises:
        ConfigError: The runtime already protects another training.
    """
    run = session.current()
    in_job = settings.CONTROL_FD.get() is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if run is None and in_job:
        run = session.init(seed=seed)
    if run is not None and (run.link is not None or run.world_size > 1):
        if run._runner.protected is not None:
            raise ConfigError(
                "this job protects a training already, and can protect only one",
                hint="call fit once in a job, and without run.protect",
            )
        return RunHost(run, folder or settings.home() / "jobs" / (settings.JOB.get() or "job"))
    if folder is None:
        folder = _new_folder(settings.home() / "fits")
    folder.mkdir(parents=True, exist_ok=True)
    return PlainHost(seed=seed, folder=folder)


def _new_folder(parent: Path) -> Path:
    """Make a folder that nothing else has: a run in one that has would go on from what is there."""
    name = f"{time.strftime('%m%d-%H%M%S')}-{os.getpid()}"
    place, number = parent / name, 1
    while True:
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            number += 1
            place = parent / f"{name}-{number}"
        else:
            return place


def is_first_process() -> bool:
    """Tell whether this process was started as rank 0; asking for a rank would park a spare."""
    return settings.SPARE.get() is None and int(os.environ.get("RANK", "0")) == 0


def settle_plan(path: Path, make: Callable[[], Plan]) -> Plan:
    """Return the plan in `path`; where there is none, one process makes it and all read it.

    The first of the first ranks makes it. The others, hot spares included, wait for the file:
    a process that comes later must train by the same plan, and timings decide part of it.
    """
    if not path.exists() and is_first_process():
        make().write(path)
    while not path.exists():
        time.sleep(0.1)
    return read_plan(path)
