# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false
"""The handle of one operation, and the future that it resolves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable


class OnceWork(dist._Work):
    """Handle of one operation; completes in whichever generation it succeeds.

    Args:
        future: Of the result.
        waiting: Told when a caller begins and ends to wait.
    """

    def __init__(self, future: torch.futures.Future[Any], waiting: Callable[[bool], None]) -> None:
        super().__init__()
        self._future = future
        self._waiting = waiting
        self.before_return: Callable[[], object] | None = None
        """What is left to do for a caller that waits; for one that takes the future, nothing is."""
        self.fetch: Callable[[], object] = future.wait
        """Waits for the result; of a message, by whom it is needed."""

    def wait(self, timeout: Any = None) -> bool:
        """Wait for the result. `timeout` is not applied: hangs are the controller's to judge.

        Raises:
            Exception: What came of handing the result over, where the caller's tensor did not
                take it.
        """
        if self._future.done():
            self._future.value()
        else:
            self._waiting(True)
            try:
                self.fetch()
            finally:
                self._waiting(False)
        if self.before_return is not None:
            self.before_return()
        return True

    def is_completed(self) -> bool:
        """Tell whether the result is there."""
        return self._future.done()

    def is_success(self) -> bool:
        """Tell whether the result is there; operations do not fail, they are served again."""
        return self._future.done()

    def get_future(self) -> torch.futures.Future[Any]:
        """Return the future of the result."""
        return self._future

    def result(self) -> list[torch.Tensor]:
        """Wait for and return the result."""
        return self._future.wait()


def future_for(value: list[Any]) -> torch.futures.Future[Any]:
    """Return a future that can resolve to `value`, tensors on devices or lists of them included."""
    devices = {each.device.index for each in value if _is_cuda(each)}
    return torch.futures.Future(devices=sorted(devices) or None)


def _is_cuda(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda
