"""What every kind of dataset offers: samples by index, with names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torch.utils.data import default_collate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trainonce.graph.features.selection import Call, Selection


# Digests, and those that they were made from, one by one.
Lineage: TypeAlias = "tuple[NDArray[np.bytes_], NDArray[np.bytes_]]"


class Source:
    """Samples by index. `how` says in words by what they are identified."""

    how = ""

    def __init__(self, num_samples: int, selection: Selection) -> None:
        self.num_samples = num_samples
        self.selection = selection

    def digests(self, variant: int | None) -> NDArray[np.bytes_]:
        """Return the digest of each sample ("S16"), or of its seeded variant."""
        raise NotImplementedError

    def call(self, index: int, variant: int | None) -> Call:
        """Return the arguments for one sample, as tensors without a batch dimension."""
        raise NotImplementedError

    def lineage(self, variant: int | None) -> list[Lineage]:
        """Return which digests were made from which others, as pairs of arrays."""
        return []

    def release(self) -> None:
        """Let go of inputs that were kept for being computed."""

    def rest(self, index: int) -> Any:
        """Return what passes through beside the features, or None."""
        raise NotImplementedError

    def rests(self, indices: NDArray[np.int64]) -> Any:
        """Return what passes through for several samples, collated."""
        found = [self.rest(index) for index in indices.tolist()]
        return None if not found or found[0] is None else default_collate(found)
