"""The nodes beside the job: idle ones, and those that come back from repair."""

from __future__ import annotations

import heapq


class SparePool:
    """Idle spares, and nodes in repair that become spares when they come back.

    Args:
        idle: Spares at the start.
    """

    def __init__(self, idle: int) -> None:
        self.idle = idle
        self.missing = 0  # nodes the job waits for
        self._returns: list[float] = []

    def send_to_repair(self, back_s: float) -> None:
        """Book a node that comes back at `back_s`."""
        heapq.heappush(self._returns, back_s)

    def try_take(self) -> bool:
        """Take an idle spare. Where there is none the job waits for the next node to come back."""
        if self.idle:
            self.idle -= 1
            return True
        self.missing += 1
        return False

    def release(self, until_s: float) -> list[float]:
        """Let nodes come back up to `until_s`; those the job waits for go to it.

        Returns:
            When each node that went to the job came back, in order.
        """
        handed: list[float] = []
        while self._returns and self._returns[0] <= until_s:
            back_s = heapq.heappop(self._returns)
            if self.missing:
                self.missing -= 1
                handed.append(back_s)
            else:
                self.idle += 1
        return handed
