"""Carry out the fault plan inside a worker: for tests and chaos drills."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import torch

from trainonce.wire.faults import AWAITED_FAULTS, RECOVERY_POINTS, Fault
from trainonce.wire.messages import FaultFiring
from trainonce.worker.torch_private import shards_parameters, visible_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trainonce.wire.messages import Message


class InjectedError(RuntimeError):
    """The exception that a fault plan raises in a worker."""


class FaultInjector:
    """Fires the faults meant for this rank at their points.

    Args:
        notify: Tells the launcher before a fault fires.
        commits: Returns the number of committed steps.
        parameters: Returns protected parameters, for bit flips.

    Attributes:
        wait: Waits until the launcher has carried out the fault that it was told of.
    """

    def __init__(
        self,
        notify: Callable[[Message], object],
        commits: Callable[[], int],
        parameters: Callable[[], list[torch.Tensor]],
    ) -> None:
        self._notify = notify
        self._commits = commits
        self._parameters = parameters
        self.wait: Callable[[], object] = lambda: None
        self._armed: list[Fault] = []
        self._passes: dict[int, int] = {}

    def arm(self, records: list[dict[str, Any]]) -> None:
        """Take the faults that remain for this rank."""
        self._armed = [Fault(**record) for record in records]

    def watch(self, modules: Iterable[torch.nn.Module]) -> None:
        """Watch the forward pass and the middle of the backward pass, if faults are planned.

        Args:
            modules: Those whose passes are meant, each from its outside.
        """
        points = {fault.point for fault in self._armed}
        for module in modules:
            if "forward" in points:
                module.register_forward_hook(lambda *_: self.at("forward"))
            if "backward" in points:
                self._watch_backward(module)

    def _watch_backward(self, module: torch.nn.Module) -> None:
        if not shards_parameters(module):
            trained = [p for p in module.parameters() if p.requires_grad]
            if trained:
                trained[len(trained) // 2].register_hook(lambda _: self.at("backward"))
            return
        # FSDP2 computes with parameters of its own making: watch what a layer gives instead.
        layers = [each for each in visible_modules(module) if any(True for _ in each.parameters())]
        layers[len(layers) // 2].register_forward_hook(self._watch_output)

    def _watch_output(self, _layer: object, _inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.at("backward"))

    def at(self, point: str, commits: int | None = None) -> None:
        """Fire what is planned for this point, if anything.

        Args:
            point: One of `trainonce.wire.faults.POINTS`.
            commits: Committed steps of the job, where this process has none of its own yet.
        """
        if not self._armed:
            return
        step = self._commits() if commits is None else commits
        for fault in list(self._armed):
            where = "begin" if fault.action in AWAITED_FAULTS else fault.point
            due = step >= fault.step if point in RECOVERY_POINTS else step == fault.step
            if where != point or not due:
                continue
            passes = self._passes.get(fault.index, 0)
            self._passes[fault.index] = passes + 1
            if passes == fault.after:
                self._armed.remove(fault)
                self._notify(FaultFiring(index=fault.index, step=fault.step, point=point))
                self._fire(fault)

    def _fire(self, fault: Fault) -> None:
        match fault.action:
            case "kill" | "lose":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                os._exit(0)
            case "raise":
                raise InjectedError(f"injected at {fault.point} of step {fault.step}")
            case "slow":
                time.sleep(fault.seconds)
            case "flip":
                # Through `.data`, since hardware does not count what it changes.
                self._parameters()[0].data.view(-1).view(torch.uint8)[0] ^= 1
            case _:
                self.wait()
