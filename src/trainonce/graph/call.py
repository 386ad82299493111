"""One call of a node's function, in whatever thread or process an executor runs it.

It must be a plain function of picklable things: process pools carry it to their children.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce.errors import UnhashableError
from trainonce.graph.digest import digest
from trainonce.graph.numerics import pinned_threads
from trainonce.graph.purity import Watch
from trainonce.graph.shipping import ByValue

if TYPE_CHECKING:
    from collections.abc import Generator

    from trainonce.graph.node import NodeFunction

# A node that must be alone takes the room of any number of others.
_ALL = 1 << 30


@dataclass
class Outcome:
    """What a call gave.

    Args:
        value: What it returned.
        seconds: How long it took.
        reasons: What it did that its key does not show.
        mutated: Arguments that it changed, where that was looked at.
        error: What it raised, with `trace` as text; None if it returned.
    """

    value: Any = None
    seconds: float = 0.0
    reasons: list[str] = field(default_factory=lambda: [])
    mutated: list[str] = field(default_factory=lambda: [])
    error: BaseException | None = None
    trace: str = ""


def call(
    function: NodeFunction[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    declared: list[str],
    gpus: tuple[int, ...] = (),
    alone: bool | None = False,
) -> Outcome:
    """Call a node's function and watch it; what it raises is part of the outcome.

    Args:
        function: The node function.
        args: Its positional arguments, with values in place of nodes.
        kwargs: The named ones.
        declared: Paths that it may read.
        gpus: Indices of the devices it occupies; the first is made the current one.
        alone: Whether no other node may run in this process meanwhile; None to ask for nothing,
            within another node's call.
    """
    options = function.options
    outcome = Outcome()
    exact = options.threads if options.numerics == "exact" else None
    with _turn(alone), pinned_threads(exact), _device(gpus):
        started = time.perf_counter()
        with Watch(function.name, declared) as watch:
            try:
                outcome.value = function.function(*args, **kwargs)
            except Exception as error:
                outcome.error = error
                outcome.trace = "".join(traceback.format_exception(error)[1:])
        outcome.seconds = time.perf_counter() - started
    outcome.reasons = watch.reasons
    return outcome


def call_elsewhere(
    function: NodeFunction[..., Any] | ByValue,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *how: Any,
) -> Outcome:
    """Do what `call` does in a process from which the outcome travels back.

    Changed arguments are noticed here, since its caller has others. What cannot travel becomes an
    exception that says so: some pools break by it, and others wait for ever.
    """
    if isinstance(function, ByValue):
        function = function.load()
    values = function.signature.bind(*args, **kwargs).arguments
    before = _digests(values)
    outcome = call(function, args, kwargs, *how)
    after = _digests(values)
    outcome.mutated = [name for name in before if after.get(name) != before[name]]
    try:
        pickle.dumps(outcome.error)
        copy.copy(outcome.error)  # made again as unpickling does it
    except Exception:
        error = outcome.error
        outcome.error = RuntimeError(f"{type(error).__name__}: {error}")
    # Dask, loky and Ray send by cloudpickle what pickle does not take.
    dumps = getattr(sys.modules.get("cloudpickle"), "dumps", pickle.dumps)
    try:
        dumps(outcome.value, protocol=5, buffer_callback=lambda _: None)
    except Exception as error:
        outcome.value = None
        outcome.error = TypeError(f"what it returned cannot be sent to another process: {error}")
    return outcome


def _digests(values: dict[str, Any]) -> dict[str, str]:
    """Return the digests of arguments that have one here: files have theirs from the caller."""
    found: dict[str, str] = {}
    for name, value in values.items():
        with contextlib.suppress(UnhashableError):
            found[name] = digest(value)
    return found


_state = threading.Condition()
_num_running = 0


@contextlib.contextmanager
def _turn(alone: bool | None) -> Generator[None]:
    """Run beside others, or alone.

    A node that seeds a global generator and puts its state back leaves no trace; another that
    draws from it at the same time would change the result of the first unseen.
    """
    global _num_running
    if alone is None:
        yield
        return
    share = _ALL if alone else 1
    with _state:
        _state.wait_for(lambda: _num_running + share <= _ALL)
        _num_running += share
    try:
        yield
    finally:
        with _state:
            _num_running -= share
            _state.notify_all()


def _device(gpus: tuple[int, ...]) -> contextlib.AbstractContextManager[Any]:
    if not gpus:
        return contextlib.nullcontext()
    import torch

    return torch.cuda.device(gpus[0])
