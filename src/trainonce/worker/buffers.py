"""Memory of logged results, used again and again."""

from __future__ import annotations

import torch


class BufferPool:
    """Reuses the memory of logged results, so that logging does not fault pages in.

    Not thread-safe; the journal's lock guards it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        self.held_bytes = 0
        self.peak_bytes = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Return a contiguous CPU tensor of the shape and dtype of `like`, values undefined."""
        key = (like.dtype, like.numel())
        free = self._free.get(key)
        if free:
            return free.pop().view(like.shape)
        self.held_bytes += like.numel() * like.element_size()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return torch.empty(like.numel(), dtype=like.dtype).view(like.shape)

    def give(self, tensors: list[torch.Tensor]) -> None:
        """Take back tensors that nobody reads or writes any more."""
        for tensor in tensors:
            self._free.setdefault((tensor.dtype, tensor.numel()), []).append(tensor.view(-1))

    def forget(self, tensors: list[torch.Tensor]) -> None:
        """Drop tensors that an abandoned operation may still write to."""
        self.held_bytes -= sum(tensor.numel() * tensor.element_size() for tensor in tensors)
