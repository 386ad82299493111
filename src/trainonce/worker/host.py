"""What the process groups ask of the process around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from trainonce.wire.messages import Generation
    from trainonce.worker.inner import InnerGroup
    from trainonce.worker.journal import Log
    from trainonce.worker.operation import Op, Outcome
    from trainonce.worker.plan import Donation, Plan


class Superseded(Exception):
    """A newer generation was announced; this recovery is void."""


class Host(Protocol):
    """The process around the fabric: see `handover`."""

    # ------------------------------------------------------------------ training threads

    @property
    def in_step(self) -> bool:
        """Whether a step is under way."""
        ...

    def recall(self) -> Outcome | None:
        """Return signature and result of an operation that the others have long behind them."""
        ...

    def before_submit(self, log: Log, op: Op) -> int | None:
        """Called on the issuing thread before each operation.

        Returns:
            An interval of its own to number the operation in, or None for the present one.
        """
        ...

    def after_submit(self) -> None:
        """Called on the issuing thread after each operation was issued."""
        ...

    # ------------------------------------------------------------------ recovery threads

    def wait_restorable(self, superseded: Callable[[], bool]) -> None:
        """Newcomer: wait until the script has registered what must be restored."""
        ...

    def frozen(self, superseded: Callable[[], bool]) -> AbstractContextManager[None]:
        """Hold updates and commits back, once none is under way."""
        ...

    def can_donate(self) -> bool:
        """Tell whether the state as of the last commit can be given now."""
        ...

    def donate(self, inner: InnerGroup, donation: Donation) -> tuple[str, int]:
        """Give this rank's stripe of the state; the first returns the digest of all stripes."""
        ...

    def receive(self, inner: InnerGroup, donation: Donation, plan: Plan) -> tuple[str, int]:
        """Take the state; return its digest and the bytes received."""
        ...

    def restore(self, plan: Plan) -> tuple[str, int]:
        """Take the state from the shadow that the rank left; return its digest and bytes."""
        ...

    def shadow_commits(self) -> list[int]:
        """For which numbers of committed steps the rank left a whole shadow of its state."""
        ...

    @property
    def shards(self) -> list[str]:
        """Shard key of each rank; empty where nothing is split, or not known yet."""
        ...

    def formed(self, message: Generation) -> None:
        """Called when this rank is consistent in the generation of `message`."""
        ...

    def fault_point(self, point: str) -> None:
        """Let the fault plan act."""
        ...
