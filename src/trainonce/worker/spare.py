"""A hot spare: a worker that waits for a rank where the script first needs one."""

from __future__ import annotations

import inspect
import os
import threading
from typing import TYPE_CHECKING, Any

import torch

from trainonce.wire.messages import Note, Parked
from trainonce.wire.progress import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trainonce.wire.messages import Message
    from trainonce.wire.progress import Progress

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK")

_HINTS = {
    "rank": "the rank is read before the first batch; read it below run.protect and inside"
    " loops or steps",
    "collective": "a collective runs before the first step; move it behind that, or into it",
    "new_group": "dist.new_group runs before the first batch; a spare can go no further",
}


class Promotion:
    """The rank of this worker, which a spare learns later.

    Args:
        notify: Tells the launcher where the spare waits.
        progress: The page to note it on.
    """

    def __init__(self, notify: Callable[[Message], object], progress: Progress) -> None:
        self._notify = notify
        self._progress = progress
        self._promoted = threading.Event()
        self.rank = -1

    @property
    def done(self) -> bool:
        """Whether this worker has a rank."""
        return self._promoted.is_set()

    def promote(self, rank: int) -> None:
        """Give this worker its rank; whatever waits for it goes on."""
        self.rank = rank
        self._promoted.set()

    def park(self, where: str, *, rehearsed: int = 0) -> int:
        """Wait for a rank, and return it."""
        if not self._promoted.is_set():
            hint = _HINTS.get(where, "")
            if hint:
                self._notify(Note(key=f"spare-{where}", text=f"spares park early: {hint}"))
            self._progress["phase"] = Phase.PARKED
            self._notify(Parked(where=where, hint=hint, rehearsed=rehearsed))
            self._promoted.wait()
        return self.rank


class WithheldEnvironment(os._Environ):  # type: ignore[type-arg]
    """`os.environ` of a spare: reading the rank waits until there is one."""

    # Set on the class: `os.environ` exists already, and its class is changed in place.
    park: Callable[[str], int]

    def __getitem__(self, key: str) -> str:
        if key in RANK_VARIABLES:
            type(self).park("rank")
        return super().__getitem__(key)


def withhold_rank(park: Callable[[str], int]) -> None:
    """Make `os.environ["RANK"]` and its like wait for the promotion.

    What is not Python sees -1 until then. A variable that is there already can be set while other
    threads read the environment (torch does, as it forms groups); a new one moves all of it.
    """
    for name in RANK_VARIABLES:
        os.putenv(name, "-1")
    WithheldEnvironment.park = staticmethod(park)
    os.environ.__class__ = WithheldEnvironment


def publish_rank(rank: int, node_rank: int = 0) -> None:
    """Set the environment that torchrun sets, and stop withholding it."""
    os.environ.__class__ = os._Environ
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), ROLE_RANK=str(rank), GROUP_RANK=str(node_rank)
    )


def call_with_batch(function: Callable[..., object], batch: Any, device: torch.device) -> bool:
    """Call a step function with a sample batch, if its parameters tell how.

    One parameter takes the batch, or the only element of one if it cannot take the batch; as
    many parameters as the batch has elements take those; a dict whose keys are the parameters'
    names is passed by name.

    Returns:
        Whether it was called.
    """
    moved = _to_device(batch, device)
    wanted = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(wanted) == 1:
        try:
            function(moved)
        except Exception:
            if not (isinstance(moved, list | tuple) and len(moved) == 1):
                raise
            function(moved[0])  # `for (x,) in run.batches(loader)`
    elif isinstance(moved, list | tuple) and len(moved) == len(wanted) > 1:
        function(*moved)
    elif isinstance(moved, dict) and wanted and {p.name for p in wanted} <= set(moved):
        function(**{p.name: moved[p.name] for p in wanted})
    else:
        return False
    return True


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        mapping: Mapping[Any, Any] = value
        return {key: _to_device(each, device) for key, each in mapping.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(each, device) for each in value)
    return value
