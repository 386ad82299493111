"""`memoize`: an ordinary training loop whose frozen layers are computed once per sample.

The wrapped loader marks the tensors it yields with the digests of their samples; the wrapped
model looks up the values at its cut, computes those that are missing, and runs the rest as
usual. Freezing or unfreezing layers, or changing the mode, moves the cut.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from trainonce.errors import UnhashableError
from trainonce.graph.booking import book, saved
from trainonce.graph.digest import digest
from trainonce.graph.features.compute import occupied
from trainonce.graph.features.cut import find_cut
from trainonce.graph.features.evaluate import store_folder
from trainonce.graph.features.fingerprint import numerics
from trainonce.graph.features.graphs import settings_of
from trainonce.graph.features.loader import MemoizedLoader
from trainonce.graph.features.marks import names_of, unmark_all, unmarked
from trainonce.graph.features.served import Served

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from numpy.typing import NDArray

    from trainonce.events import Event
    from trainonce.graph.features.selection import Inputs
    from trainonce.graph.store import Store

_log = logging.getLogger(__name__)
# A cut takes seconds: it pays for a few shapes of inputs, not for one in each batch.
_MAX_SHAPES = 8


def memoize(
    model: torch.nn.Module,
    loader: Any,
    *,
    inputs: Inputs = None,
    store: Store | str | os.PathLike[str] | None = None,
    storage_dtype: torch.dtype | None = None,
    sink: Callable[[Event], None] | None = None,
) -> tuple[MemoizedModel, MemoizedLoader]:
    """Serve the frozen part of `model` from stored rows inside an ordinary loop.

    ::

        model, loader = once.memoize(model, loader)
        for x, y in loader:
            loss = loss_of(model(x.to(device)), y.to(device))

    Args:
        model: Any part of it may be frozen (`requires_grad_(False)`, and `.eval()` for layers
            with batch statistics or dropout), and that may change at any time.
        loader: A `DataLoader` over a map-style dataset whose samples repeat.
        inputs: Which items of a batch enter the model; the first of a tuple by default.
        store: Folder of the store, or the store; `$TRAINONCE_STORE`, or `$TRAINONCE_HOME/store`.
        storage_dtype: What floating-point rows are stored as; None keeps their own.
        sink: Takes a `ComputeSaved` event at the end of each epoch that was served rows; the
            ledger if None.

    Returns:
        The model, with its parameters as they were under `.module`, and the loader.

    Raises:
        DataError: The loader's samples are random, or it is no `DataLoader` over items.
    """
    memoized = MemoizedModel(model, store=store, storage_dtype=storage_dtype, sink=sink)
    return memoized, MemoizedLoader(loader, memoized, inputs)


@dataclass
class MemoReport:
    """What a memoized model did so far.

    Args:
        hits: Rows that were served.
        computed: Rows that were computed.
        cuts: How often the model was cut anew.
        where: Where it is cut now, or why it is not.
        compute_s: Seconds spent on computing rows.
        read_s: Seconds spent on reading rows.
    """

    hits: int = 0
    computed: int = 0
    cuts: int = 0
    where: str = ""
    compute_s: float = 0.0
    read_s: float = 0.0


class MemoizedModel(torch.nn.Module):
    """A model whose frozen prefix is served from the row store; made by `memoize`."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        store: Store | str | os.PathLike[str] | None,
        storage_dtype: torch.dtype | None,
        sink: Callable[[Event], None] | None,
    ) -> None:
        super().__init__()
        self.module = model
        self.training = model.training
        self.report = MemoReport()
        self.folder = store_folder(store)
        self._storage_dtype = storage_dtype
        self._sink = sink
        self._plans: dict[tuple[Any, ...], Served | None] = {}
        self._reasons: dict[tuple[Any, ...], str] = {}
        self._settings = ""
        self._sunk_hits = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns.

        Raises:
            DataError: An input on a device carries no mark of its rows.
        """
        flat, spec = tree_flatten((args, kwargs))
        plain = [unmarked(value) for value in flat]
        served = self._served(plain, spec, args, kwargs)
        if served is None:
            return self.module(*unmark_all(args), **unmark_all(kwargs))
        names, origins = names_of([flat[place] for place in served.plan.inputs])
        for origin in origins:
            served.shelf.note_origin(names, origin)
        values = self._values(served, names, plain)
        return served.plan.suffix(values, tuple(plain))

    def explain(self) -> str:
        """Return where the model is cut, or why it is not."""
        return self.report.where

    def start_epoch(self) -> None:
        """Look for changes that leave no trace: settings of layers, writes through `.data`."""
        try:
            self._settings = digest(settings_of(self.module))
        except UnhashableError as error:
            self._settings = f"unknown: {error.message}"
        for served in self._plans.values():
            if served is not None:
                served.rehash = True

    def end_epoch(self) -> None:
        """Commit what was computed, and report what was served."""
        for served in self._plans.values():
            if served is not None:
                served.shelf.flush()
        hits = self.report.hits - self._sunk_hits
        self._sunk_hits = self.report.hits
        if hits:
            rate_s = self.report.compute_s / max(1, self.report.computed)
            first = next(self.module.parameters(), torch.empty(0))
            (self._sink or book)(
                saved(
                    f"memoize({type(self.module).__qualname__})",
                    self.report.where,
                    seconds=hits * rate_s,
                    read_s=self.report.read_s,
                    **occupied(first.device),
                )
            )

    # ------------------------------------------------------------ inside

    def _served(self, plain: list[Any], spec: Any, args: Any, kwargs: Any) -> Served | None:
        token = self._token(plain, spec)
        served = self._plans.get(token)
        if served is not None and served.stale():
            served.shelf.flush()
            del self._plans[token]
        if token not in self._plans:
            self._cut(token, unmark_all(args), unmark_all(kwargs), plain)
        served = self._plans.get(token)
        self.report.where = self._reasons[token]
        return served

    def _cut(self, token: tuple[Any, ...], args: Any, kwargs: Any, plain: list[Any]) -> None:
        rows = next((len(v) for v in plain if isinstance(v, torch.Tensor) and v.ndim), 0)
        if rows < 2:
            # One row says nothing about batches; the next larger batch will be cut.
            self._plans[token], self._reasons[token] = None, "the batch has a single row"
            return
        alike = sum(other[:3] == token[:3] for other in self._plans)
        if alike >= _MAX_SHAPES:
            self._plans[token] = None
            self._reasons[token] = "not cut: inputs differ in shape from batch to batch"
            return
        plan, reason = find_cut(self.module, args, kwargs, self._storage_dtype)
        self.report.cuts += 1
        self._reasons[token] = plan.where if plan else f"not cut: {reason}"
        _log.info("%s: %s", type(self.module).__qualname__, self._reasons[token])
        self._plans[token] = None if plan is None else Served(plan, self.folder)

    def _token(self, plain: list[Any], spec: Any) -> tuple[Any, ...]:
        """Return what decides about the cut and is cheap to look at."""
        shapes = tuple(
            (value.dtype, value.shape[1:], len(value) > 1, value.device.type, value.requires_grad)
            if isinstance(value, torch.Tensor)
            else repr(value)
            for value in plain
        )
        tensors = [value for value in plain if isinstance(value, torch.Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        return (
            self._settings,
            tuple(part.training for part in self.module.modules()),
            tuple(parameter.requires_grad for parameter in self.module.parameters()),
            shapes,
            str(spec),
            numerics(device, exact=False),
        )

    def _values(
        self, served: Served, names: NDArray[np.bytes_], plain: list[Any]
    ) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        slots = served.shelf.locate(names)
        missing = np.flatnonzero(slots < 0)
        device = next(plain[place].device for place in served.plan.inputs)
        stored: dict[str, torch.Tensor] = {}
        if len(missing) < len(names):
            stored = served.take(np.where(slots < 0, slots.max(), slots), device)
        self.report.hits += len(names) - len(missing)
        self.report.read_s += time.perf_counter() - started
        if not len(missing):
            return stored
        started = time.perf_counter()
        fresh, num_computed = served.make(names, missing, plain, self._storage_dtype)
        self.report.computed += num_computed
        self.report.hits += len(missing) - num_computed
        self.report.compute_s += time.perf_counter() - started
        if len(missing) == len(names):
            return fresh
        places = torch.from_numpy(missing).to(device)
        return {key: value.index_copy(0, places, fresh[key]) for key, value in stored.items()}
