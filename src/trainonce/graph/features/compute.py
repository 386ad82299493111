"""Computing the rows that are missing, a chunk at a time, in batches of one fixed size."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from trainonce.errors import DataError, LeaseLostError, StateMismatchError
from trainonce.graph.features.claims import Claims
from trainonce.graph.features.fingerprint import write_aside
from trainonce.graph.features.samples import generator_states
from trainonce.graph.features.segments import Column, Rows
from trainonce.graph.features.selection import Call
from trainonce.graph.features.tables import COST

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.rows import RowTable

_log = logging.getLogger(__name__)
# What is claimed and committed at once: enough for few files, little enough for memory.
_BATCHES_PER_CHUNK = 16
_CHUNK_BYTES = 64 << 20
_WINDOW_ROWS = 1 << 14
# Largest difference between two evaluations of a row, relative to its largest value. Another
# batch, thread count or host adds up in another order.
TOLERANCES = {
    torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2,
}  # fmt: skip

Collate = Callable[[list[Any]], Any]


@dataclass
class Engine:
    """Calls the module on batches of samples and returns their outputs as rows.

    Args:
        module: Frozen, on `device`.
        call_of: Returns the arguments for one sample.
        ragged: Output name to where its rows' lengths are: the name of another output.
        batch_size: Of every call; the last one is filled up with its last sample.
        collate: Makes a batch of one argument's values.
        device: Where the module is.
        storage_dtype: What floating-point outputs are stored as; None keeps their own.
    """

    module: torch.nn.Module
    call_of: Callable[[int], Call]
    batch_size: int
    device: torch.device
    ragged: Mapping[str, str] = field(default_factory=lambda: {})
    collate: Collate = default_collate
    storage_dtype: torch.dtype | None = None
    num_batches: int = 0
    row_bytes: int = 0

    def chunk_rows(self) -> int:
        """Return how many rows to compute before they are committed: whole batches."""
        if not self.row_bytes:
            return self.batch_size
        fitting = _CHUNK_BYTES // (self.row_bytes * self.batch_size)
        return self.batch_size * min(_BATCHES_PER_CHUNK, max(1, fitting))

    def batch(self, indices: list[int]) -> Call:
        """Return the arguments for these samples as one batch of `batch_size`, on the device."""
        padded = indices + [indices[-1]] * (self.batch_size - len(indices))
        # Padding repeats decoded samples, it reads none twice.
        calls = {index: self.call_of(index) for index in dict.fromkeys(padded)}
        first = calls[padded[0]]
        args = tuple(
            self._collated([calls[index].args[place] for index in padded])
            for place in range(len(first.args))
        )
        kwargs = {
            name: self._collated([calls[index].kwargs[name] for index in padded])
            for name in first.kwargs
        }
        return Call(args, kwargs)

    def _collated(self, values: list[Any]) -> Any:
        try:
            return self._move(self.collate(values))
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"samples cannot be joined to a batch: {error}",
                hint="give features(..., collate=), for rows of differing length one that pads",
            ) from error

    def rows(self, digests: NDArray[np.bytes_], indices: list[int]) -> Rows:
        """Compute the rows of some samples.

        Raises:
            DataError: The module drew random numbers or changed its buffers, or its outputs
                are not one entry a sample.
        """
        parts: list[dict[str, torch.Tensor | list[torch.Tensor]]] = []
        for start in range(0, len(indices), self.batch_size):
            chosen = indices[start : start + self.batch_size]
            parts.append(self._outputs(self.batch(chosen), len(chosen)))
        columns: list[Column] = []
        values: list[torch.Tensor | list[torch.Tensor]] = []
        for name in parts[0]:
            pieces = [part[name] for part in parts]
            if name in self.ragged:
                merged: Any = [row for piece in pieces for row in piece]
                columns.append(_column(name, merged[0], ragged=True))
            else:
                merged = _merge(name, pieces)
                columns.append(_column(name, merged[0], ragged=False))
            values.append(merged)
        self.row_bytes = max(1, sum(_nbytes(value) for value in values) // len(indices))
        return Rows(digests, tuple(columns), tuple(values))

    def _outputs(self, call: Call, num_rows: int) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        with _unchanged(self.module), torch.no_grad():
            found = self.module(*call.args, **call.kwargs)
        self.num_batches += 1
        named = name_outputs(found)
        out: dict[str, torch.Tensor | list[torch.Tensor]] = {}
        for name, value in named.items():
            if value.ndim == 0 or value.shape[0] != self.batch_size:
                raise DataError(
                    f"output {name!r} has shape {tuple(value.shape)} for a batch of "
                    f"{self.batch_size}: it is not one entry a sample",
                    hint="choose the outputs to store with outputs=",
                )
            stored = value[:num_rows].detach().to("cpu")
            if self.storage_dtype is not None and stored.is_floating_point():
                stored = stored.to(self.storage_dtype)
            out[name] = stored
        for name, lengths_name in self.ragged.items():
            if name not in named or lengths_name not in named:
                raise DataError(
                    f"ragged={{{name!r}: {lengths_name!r}}} names no outputs",
                    hint=f"the outputs are {sorted(named)}",
                )
            lengths = named[lengths_name][:num_rows].tolist()
            rows: Any = out[name]
            out[name] = [row[: int(n)].clone() for row, n in zip(rows, lengths, strict=True)]
        return out

    def _move(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.device)
        if isinstance(value, dict):
            return {key: self._move(item) for key, item in value.items()}
        return value


class Cut(torch.nn.Module):
    """A module with some of its outputs chosen, so that the choice is part of its graph.

    Args:
        module: The frozen module, or any callable.
        outputs: None keeps all; a key takes one; a sequence takes several as a dict; a
            function is applied to what the module returns.
    """

    def __init__(self, module: Callable[..., Any], outputs: Any) -> None:
        super().__init__()
        self.inner = module
        self.outputs = outputs
        if isinstance(module, torch.nn.Module):
            self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module and choose."""
        found = self.inner(*args, **kwargs)
        if self.outputs is None:
            return found
        if callable(self.outputs):
            return self.outputs(found)
        if isinstance(self.outputs, (int, str)):
            return found[self.outputs]
        return {str(key): found[key] for key in self.outputs}


def choose(module: Callable[..., Any], outputs: Any) -> torch.nn.Module:
    """Return the module that computes just `outputs`; the given one where that is all."""
    if outputs is None and isinstance(module, torch.nn.Module):
        return module
    inner = module.forward if isinstance(module, torch.nn.Module) else module
    return _cut_like(inner)(module, outputs)


def _cut_like(function: Callable[..., Any]) -> type[Cut]:
    """Return a `Cut` with the parameters of `function`: torch.export cannot do with **kwargs."""

    def forward(self: Cut, *args: Any, **kwargs: Any) -> Any:
        return Cut.forward(self, *args, **kwargs)

    try:
        signature = inspect.signature(function)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [own, *signature.parameters.values()]
        vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    except ValueError:  # compiled code does not say
        return Cut
    return type("Cut", (Cut,), {"forward": forward})


def name_outputs(found: Any) -> dict[str, torch.Tensor]:
    """Return outputs by name: "" for a single tensor, places for a tuple, keys for a dict.

    Raises:
        DataError: An output is no tensor.
    """
    if isinstance(found, torch.Tensor):
        return {"": found}
    if isinstance(found, Mapping):
        named = {str(key): value for key, value in found.items()}
    elif isinstance(found, (tuple, list)):
        named = {str(place): value for place, value in enumerate(found)}
    else:
        named = {"": found}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise DataError(
                f"output {name!r} is a {type(value).__qualname__}, not a tensor",
                hint="choose the outputs to store with outputs=",
            )
    return named


@dataclass
class Filled:
    """What filling a table took."""

    computed: int = 0
    computed_elsewhere: int = 0
    refused: int = 0
    seconds: float = 0.0


def fill(
    table: RowTable,
    folder: Path,
    digests: NDArray[np.bytes_],
    engine: Engine,
    committed: Callable[[], None] = lambda: None,
) -> Filled:
    """Compute every row that is missing, sharing the work with other processes.

    Args:
        table: Where rows go.
        folder: Of the row store.
        digests: Sample digests, "S16", in the order in which the engine knows the samples.
        engine: Computes them.
        committed: Called after each commit of rows.

    Returns:
        What was computed here, and what others computed meanwhile.
    """
    done = Filled()
    missing, places = _missing(table, digests)
    num_missing = len(missing)
    if not num_missing:
        return done
    index_of = dict(zip(missing.tolist(), places.tolist(), strict=True))
    claims = Claims(table, folder)
    blocked = 0
    while len(missing):
        # A window at a time: looking up all of them for each chunk would cost more than rows.
        window, missing = missing[:_WINDOW_ROWS], missing[_WINDOW_ROWS:]
        window = window[table.locate(window) < 0]
        if not len(window):
            continue
        chunk = claims.choose(window, engine.chunk_rows())
        if chunk is not None:
            _compute_chunk(table, claims, chunk, engine, index_of, done)
            committed()
            missing, blocked = np.concatenate([window, missing]), 0
            continue
        # Others are at all of these: look at the rest first, and wait when there is none.
        missing, blocked = np.concatenate([missing, window]), blocked + len(window)
        if blocked >= len(missing):
            claims.wait()
            table.refresh()
            blocked = 0
    done.computed_elsewhere = num_missing - done.computed
    if done.computed:
        _note_cost(table.folder, done)
    return done


def _compute_chunk(
    table: RowTable,
    claims: Claims,
    chunk: Any,
    engine: Engine,
    index_of: dict[bytes, int],
    done: Filled,
) -> None:
    if not len(chunk.digests):
        return
    with claims.holding(chunk):
        started = time.perf_counter()
        indices = [index_of[name] for name in chunk.digests.tolist()]
        rows = engine.rows(chunk.digests, indices)
        done.seconds += time.perf_counter() - started
        try:
            claims.confirm(chunk)
        except LeaseLostError as error:
            _log.warning("%s", error.message)
            done.refused += len(rows)
            return
        table.put(rows)
        done.computed += len(rows)


def occupied(device: torch.device) -> dict[str, int]:
    """Return what computing rows on this device occupies: CPU threads, or one GPU."""
    if device.type == "cuda":
        return {"threads": 1, "gpus": 1}
    return {"threads": torch.get_num_threads(), "gpus": 0}


def compare(fresh: Rows, stored: tuple[Any, ...]) -> float:
    """Return the largest difference between rows, in units of what is tolerated.

    Differences count relative to the row's largest value; 1.0 is the tolerance of the dtype
    (`TOLERANCES`), and integers must be equal.
    """
    worst = 0.0
    for column, new, old in zip(fresh.columns, fresh.values, stored, strict=True):
        tolerance = TOLERANCES.get(column.torch_dtype, 0.0)
        for row, kept in zip(new, old, strict=True):
            if row.shape != kept.shape:
                return float("inf")
            if torch.equal(row, kept) or row.numel() == 0:
                continue
            if tolerance == 0.0:
                return float("inf")
            scale = max(row.double().abs().max().item(), 1e-6)
            gap = (row.double() - kept.double()).abs().max().item() / (scale * tolerance)
            worst = max(worst, float("inf") if np.isnan(gap) else gap)
    return worst


def check_rows_independent(engine: Engine, num_samples: int) -> None:
    """Compare rows computed in different batches, where independence is not proven.

    Raises:
        StateMismatchError: A row depends on the others in its batch.
    """
    num_rows = min(engine.batch_size, num_samples)
    together = list(range(num_rows))
    names = np.zeros(num_rows, "S16")
    fresh = engine.rows(names, together)
    # Other company, another place: the second half, reversed, padded with its last row; and some
    # rows in batches of their own.
    others = [together[num_rows // 2 :][::-1]]
    others += [[index] for index in sorted({0, num_rows // 3, 2 * num_rows // 3, num_rows - 1})]
    gap = 0.0
    for chosen in others:
        again = engine.rows(names[: len(chosen)], chosen)
        kept = tuple([value[index] for index in chosen] for value in fresh.values)
        gap = max(gap, compare(again, kept))
    if gap > 1.0:
        raise StateMismatchError(
            f"a sample's output depends on the other samples in its batch (by {gap:.3g} times "
            "the tolerance), so it has no value of its own to store",
            hint="freeze layers that mix samples, such as batch statistics, with .eval()",
        )


def _missing(
    table: RowTable, digests: NDArray[np.bytes_]
) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """Return distinct digests without a row, and the place of each one's first sample."""
    absent = np.flatnonzero(table.locate(digests) < 0)
    _, first = np.unique(digests[absent], return_index=True)
    places = absent[np.sort(first)]
    return digests[places], places


def _note_cost(folder: Path, done: Filled) -> None:
    cost = {"rows": done.computed, "seconds": done.seconds}
    write_aside(folder / COST, json.dumps(cost).encode())


def _nbytes(value: torch.Tensor | list[torch.Tensor]) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else sum(row.nbytes for row in value)


def _merge(name: str, pieces: list[Any]) -> torch.Tensor:
    try:
        return torch.cat(pieces)
    except RuntimeError as error:
        raise DataError(
            f"output {name!r} has another shape from batch to batch: "
            f"{sorted({tuple(piece.shape[1:]) for piece in pieces})}",
            hint="declare it with ragged={output: output that holds the lengths}",
        ) from error


def _column(name: str, row: torch.Tensor, *, ragged: bool) -> Column:
    dtype = str(row.dtype).removeprefix("torch.")
    return Column(name, dtype, tuple(row.shape[1:] if ragged else row.shape), ragged)


@contextlib.contextmanager
def _unchanged(module: torch.nn.Module) -> Any:
    """Refuse a call that draws random numbers or changes a buffer, whatever the graph said."""
    states = generator_states()
    versions = [(buffer.data_ptr(), buffer._version) for buffer in module.buffers()]
    yield
    if generator_states() != states:
        raise DataError(
            "the module drew random numbers: a stored output would freeze one draw of them",
            hint="call .eval() on it first",
        )
    if versions != [(buffer.data_ptr(), buffer._version) for buffer in module.buffers()]:
        raise DataError(
            "the module changed its buffers when called", hint="call .eval() on it first"
        )
