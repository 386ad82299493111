"""A frozen model over a stream of frames that repeat: each distinct frame once, in little memory.

Frames are equal if their bytes are. Where the owner declares it, frames that are equal after
quantisation are one as well; hits of that kind are audited, and the first that is off by more
than was declared ends the quantisation.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from trainonce.errors import ConfigError
from trainonce.graph.features.fingerprint import Fingerprint, Versions, fingerprint
from trainonce.graph.features.samples import content_digest
from trainonce.graph.features.selection import Call

_log = logging.getLogger(__name__)
# What an entry takes beside its tensors: names, list and dictionary cells.
_ENTRY_BYTES = 256


@dataclass
class FrameReport:
    """What a stream took.

    Args:
        frames: Frames that were asked for.
        computed: Calls of the model, audits not counted.
        hits: Frames whose bytes were known.
        near_hits: Frames that were known after quantisation only.
        evicted: Outputs that gave way to others.
        audited: Near hits that were computed all the same, and compared.
        worst: Largest difference that an audit found, relative to the output's largest value.
        ended: Why quantisation ended; empty while it is on, or never was.
    """

    frames: int = 0
    computed: int = 0
    hits: int = 0
    near_hits: int = 0
    evicted: int = 0
    audited: int = 0
    worst: float = 0.0
    ended: str = ""


class FrameCache:
    """A frozen model that computes each distinct frame of a stream once.

    ::

        serve = once.FrameCache(model, max_bytes=2 << 20)
        for frame in camera:
            boxes = serve(frame)

    Outputs live in memory, the least recently used give way. They are valid for the weights that
    they were computed with: in-place changes are noticed, writes through `.data` are not.

    Args:
        model: Takes a batch of one frame. In the mode in which it is to be evaluated; refused
            if it draws random numbers or changes buffers.
        max_bytes: What outputs and their names may take.
        step: Opt-in quantisation: frames whose values agree after rounding to multiples of this
            count as one. None: only equal bytes do.
        tolerance: Declared with `step`: how far an output served for a near frame may be off,
            relative to the output's largest value.
        audit: Fraction of near hits that are computed all the same, and compared. The first one
            beyond the tolerance ends the quantisation.

    Raises:
        ConfigError: `step` without a tolerance or an audit, or an argument out of range.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        max_bytes: int,
        step: float | None = None,
        tolerance: float | None = None,
        audit: float = 0.05,
    ) -> None:
        if step is not None and (tolerance is None or step <= 0 or not 0 < audit <= 1):
            raise ConfigError(
                f"step={step}, tolerance={tolerance}, audit={audit}: near frames are served only "
                "with a positive step, a declared tolerance and a positive share of audits",
                hint="FrameCache(model, max_bytes=..., step=2 / 255, tolerance=0.05, audit=0.05)",
            )
        if max_bytes <= 0:
            raise ConfigError(f"max_bytes={max_bytes} leaves no room")
        self.model = model
        self.report = FrameReport()
        self.step = step
        self.tolerance = tolerance or 0.0
        self.audit = audit
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, tuple[bytes, Any, int]] = OrderedDict()
        self._bytes = 0
        self._versions = Versions(lambda: (*model.parameters(), *model.buffers()))
        self._proof: Fingerprint | None = None
        self._chance = random.SystemRandom()  # audits must not be foreseeable

    @property
    def size_bytes(self) -> int:
        """What outputs and their names take."""
        return self._bytes

    def __call__(self, frame: torch.Tensor) -> Any:
        """Return the model's output for a frame; it is the caller's to change.

        Args:
            frame: Without a batch dimension.

        Raises:
            DataError: The model is not deterministic.
        """
        self.report.frames += 1
        if self._versions.changed():
            self._kept.clear()
            self._bytes, self._proof = 0, None
        exact = content_digest(Call((frame,), {}))
        name = exact if self.step is None else self._near(frame, self.step)
        kept = self._kept.get(name)
        if kept is None:
            output = self._compute(frame)
            self._keep(name, exact, _copy(output))
            return output
        self._kept.move_to_end(name)
        if kept[0] == exact:
            self.report.hits += 1
            return _copy(kept[1])
        self.report.near_hits += 1
        if self._chance.random() < self.audit:
            return self._audited(frame, kept[1])
        return _copy(kept[1])

    def _near(self, frame: torch.Tensor, step: float) -> bytes:
        rounded = torch.round(frame.double() / step).to(torch.int64)
        return content_digest(Call((rounded,), {}))

    def _compute(self, frame: torch.Tensor) -> Any:
        if self._proof is None:
            # Raises where an output would freeze a draw, or the state of a buffer.
            self._proof = fingerprint(self.model, (torch.stack([frame, frame]),))
        self.report.computed += 1
        with torch.no_grad():
            found = self.model(frame[None])
        leaves, spec = tree_flatten(found)
        return tree_unflatten(
            [leaf[0].clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
        )

    def _keep(self, name: bytes, exact: bytes, output: Any) -> None:
        size = _ENTRY_BYTES + sum(
            leaf.nbytes for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)
        )
        if size > self._max_bytes:
            return
        self._bytes += size
        self._kept[name] = (exact, output, size)
        while self._bytes > self._max_bytes:
            _, (_, _, freed) = self._kept.popitem(last=False)
            self._bytes -= freed
            self.report.evicted += 1

    def _audited(self, frame: torch.Tensor, kept: Any) -> Any:
        """Compute a near hit, compare it with what would have been served, and return it."""
        fresh = self._compute(frame)
        self.report.computed -= 1
        self.report.audited += 1
        gap = _gap(fresh, kept)
        self.report.worst = max(self.report.worst, gap)
        if gap > self.tolerance:
            self.report.ended = (
                f"an audit found an output off by {gap:.3g}, over the declared {self.tolerance:g}"
            )
            _log.warning("quantisation ends: %s", self.report.ended)
            self.step = None
            self._kept.clear()
            self._bytes = 0
        return fresh


def _copy(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)


def _gap(fresh: Any, kept: Any) -> float:
    """Return the largest difference of two outputs, relative to their largest value."""
    worst = 0.0
    for new, old in zip(tree_flatten(fresh)[0], tree_flatten(kept)[0], strict=True):
        if not isinstance(new, torch.Tensor):
            worst = max(worst, 0.0 if new == old else float("inf"))
        elif new.shape != old.shape:
            return float("inf")
        elif new.numel():
            scale = max(float(new.double().abs().max()), 1e-12)
            gap = float((new.double() - old.double()).abs().max()) / scale
            worst = max(worst, float("inf") if gap != gap else gap)
    return worst
