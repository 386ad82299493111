"""What a lever is: metadata, state that survives, and the events of a training loop it hooks.

Every lever is an object of its own that works in anybody's loop. Those that act while training
goes on are `Lever`s: they hook some of the events below, and `Stack` calls several of them in
one order. All events do nothing by default, so a lever says what it does by what it overrides.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from trainonce.errors import ConfigError, StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

F = TypeVar("F")


@dataclass(frozen=True, kw_only=True)
class LeverInfo:
    """What is known about a lever before it is tried.

    Args:
        name: As in the registry.
        saves: What it saves, and how much was measured, with the condition.
        source: Where the method comes from: authors, venue, year.
        applies: When to use it.
        hurts: When it costs quality or time.
        reversible: It can be switched off in mid-run, and training goes on as if it had been
            off from there.
        default_on: Whether it is worth having on without asking.
    """

    name: str
    saves: str
    source: str
    applies: str
    hurts: str
    reversible: bool
    default_on: bool


def describes(info: LeverInfo) -> Callable[[F], F]:
    """Mark a function as a lever that acts once; it gets the attribute `info`."""

    def mark(function: F) -> F:
        vars(function)["info"] = info
        return function

    return mark


class Lever:
    """Base of levers that act during training.

    The events of a step, in order: `begin_step`, `shape_batch`, `autocast` around the forward
    pass, `reduce_loss`, `backward`, `update`, `end_step`. Use only the ones that a lever
    overrides; its docstring names them.

    Protect it like an optimizer: `run.protect(..., lever=lever)`. Its state is equal on all
    ranks, and decisions depend on that state and on the step number alone.

    Attributes:
        info: What is known about it.
        enabled: False makes every event do nothing.
    """

    info: ClassVar[LeverInfo]

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled

    def begin_step(self, step: int) -> None:
        """Get ready for update number `step`, from 0; set rates, freeze layers."""

    def shape_batch(self, batch: Any) -> Any:
        """Return the batch to train on in this step."""
        return batch

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for the forward pass and the loss."""
        return contextlib.nullcontext()

    def reduce_loss(self, losses: torch.Tensor, indices: torch.Tensor) -> torch.Tensor | None:
        """Return the scalar loss of per-sample `losses`, or None to leave that to another.

        Args:
            losses: Shape (samples,), on any device.
            indices: Shape (samples,), int64: which sample of the dataset each one is.
        """
        del losses, indices
        return None

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return what to call `backward()` on."""
        return loss

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step `optimizer` if updating is this lever's affair; tell whether it was."""
        del optimizer
        return False

    def end_step(self, step: int) -> None:
        """Look at gradients after update number `step`, before they are cleared."""

    def ramping(self, step: int) -> bool:
        """Tell whether losses of `step` cannot be compared with later ones: a warm-up."""
        del step
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return all state, as plain values and tensors."""
        return {"enabled": self.enabled, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            StateMismatchError: It is another lever's.
        """
        rest = {key: value for key, value in state.items() if key != "enabled"}
        if "enabled" not in state or rest.keys() != self._state().keys():
            raise StateMismatchError(
                f"state with {sorted(state)} is not that of the lever {self.info.name}",
                hint="register the same levers under the same names as the run began with",
            )
        self.enabled = bool(state["enabled"])
        self._load_state(rest)

    def _state(self) -> dict[str, Any]:
        return {}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        del state


class Stack(Lever):
    """Several levers as one, each event in the order given.

    Args:
        levers: Name to lever. At most one may reduce the loss, and one update; the first
            that does, does.

    Raises:
        ConfigError: A lever is no `Lever`.
    """

    info = LeverInfo(
        name="stack",
        saves="what its members save",
        source="",
        applies="more than one lever is on",
        hurts="see its members",
        reversible=False,
        default_on=True,
    )

    def __init__(self, **levers: Lever) -> None:
        super().__init__()
        for name, lever in levers.items():
            if not isinstance(lever, Lever):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"{name}={type(lever).__name__} is no lever")
        self.levers = dict(levers)

    def _on(self) -> Iterable[Lever]:
        return [lever for lever in self.levers.values() if lever.enabled and self.enabled]

    def begin_step(self, step: int) -> None:
        """Call every lever's."""
        for lever in self._on():
            lever.begin_step(step)

    def shape_batch(self, batch: Any) -> Any:
        """Return the batch after every lever has shaped it in turn."""
        for lever in self._on():
            batch = lever.shape_batch(batch)
        return batch

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return all contexts as one."""
        stack = contextlib.ExitStack()
        for lever in self._on():
            stack.enter_context(lever.autocast())
        return stack

    def reduce_loss(self, losses: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the first lever's scalar loss, or the mean where none reduces."""
        for lever in self._on():
            found = lever.reduce_loss(losses, indices)
            if found is not None:
                return found
        return losses.mean()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss after every lever has scaled it in turn."""
        for lever in self._on():
            loss = lever.scale_loss(loss)
        return loss

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step `optimizer`, through the lever whose affair that is if there is one."""
        if not any(lever.update(optimizer) for lever in self._on()):
            optimizer.step()
        return True

    def end_step(self, step: int) -> None:
        """Call every lever's."""
        for lever in self._on():
            lever.end_step(step)

    def ramping(self, step: int) -> bool:
        """Tell whether any lever is."""
        return any(lever.ramping(step) for lever in self._on())

    def _state(self) -> dict[str, Any]:
        return {name: lever.state_dict() for name, lever in self.levers.items()}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        for name, lever in self.levers.items():
            lever.load_state_dict(state[name])
