"""Memory of logged results, used again and again."""

from __future__ import annotations

import torch


class BufferPool:
    """Reuses the memory of logged results, so that logging does not fault pages in.

    It holds at most twice what was ever in use at once: beyond that, memory of sizes that were
    not asked for in a long time makes room for others.

    Not thread-safe; the journal's lock guards it.
    """

    def __init__(self) -> None:
        # By dtype and number of elements, that asked for last at the end.
        self._free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self._free_bytes = 0
        self._most_used_bytes = 0
        self.held_bytes = 0
        """In use and free."""
        self.peak_bytes = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Return a contiguous CPU tensor of the shape and dtype of `like`, values undefined."""
        key = (like.dtype, like.numel())
        free = self._free[key] = self._free.pop(key, [])
        if free:
            self._free_bytes -= free[-1].nbytes
            return free.pop().view(like.shape)
        num_bytes = like.numel() * like.element_size()
        self._make_room(num_bytes)
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return torch.empty(like.numel(), dtype=like.dtype).view(like.shape)

    def _make_room(self, num_bytes: int) -> None:
        used = self.held_bytes - self._free_bytes + num_bytes
        self._most_used_bytes = max(self._most_used_bytes, used)
        for key in list(self._free):
            while self._free[key]:
                if self.held_bytes + num_bytes <= 2 * self._most_used_bytes:
                    return
                dropped = self._free[key].pop().nbytes
                self._free_bytes -= dropped
                self.held_bytes -= dropped
            del self._free[key]

    def give(self, tensors: list[torch.Tensor]) -> None:
        """Take back tensors that nobody reads or writes any more."""
        for tensor in tensors:
            self._free.setdefault((tensor.dtype, tensor.numel()), []).append(tensor.view(-1))
            self._free_bytes += tensor.nbytes

    def adopt(self, tensors: list[torch.Tensor]) -> None:
        """Count contiguous CPU tensors that came from elsewhere, and that will be given back."""
        self.held_bytes += sum(tensor.nbytes for tensor in tensors)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def forget(self, tensors: list[torch.Tensor]) -> None:
        """Drop tensors that an abandoned operation may still write to."""
        self.held_bytes -= sum(tensor.nbytes for tensor in tensors)
