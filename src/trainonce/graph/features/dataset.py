"""Stored rows as a dataset: what `features` returns."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, default_collate

from trainonce.errors import StateMismatchError, StoreError
from trainonce.graph.booking import book, saved
from trainonce.graph.features.compute import (
    Engine,
    Filled,
    check_rows_independent,
    compare,
    fill,
    occupied,
)
from trainonce.graph.features.fingerprint import Fingerprint, write_aside
from trainonce.graph.features.items import refuse_forgotten
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.tables import forgotten, seconds_per_row
from trainonce.graph.features.upkeep import make_room, note_lineage, note_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.events import Event
    from trainonce.graph.features.segments import Column
    from trainonce.graph.features.source import Source


@dataclass(frozen=True)
class Report:
    """What `features` found and did.

    Args:
        num_samples: Of the dataset.
        hits: Samples whose row was there already.
        computed: Rows computed by this call.
        computed_elsewhere: Rows that other processes computed meanwhile.
        num_batches: Calls of the module, checks and audits included.
        compute_s: Seconds that computing took.
        saved_s: Seconds that the hits took when they were computed, where that is known.
        lookup_s: Seconds spent on finding out what is there.
        identity: By what samples are known.
        proof: How the module is known: "export", "fx" or "declared", and what is proven.
        audited: Rows that were computed again and compared.
        audit_worst: Largest difference found, in units of the tolerance.
    """

    num_samples: int
    hits: int
    computed: int
    computed_elsewhere: int
    num_batches: int
    compute_s: float
    saved_s: float
    lookup_s: float
    identity: str
    proof: str
    audited: int = 0
    audit_worst: float = 0.0


class FeatureRows(Dataset[Any]):
    """A map-style dataset of stored rows; made by `features`.

    `rows[i]` is one sample, its features in the place of what entered the module.
    `DataLoader(rows, batch_size=256, shuffle=True, collate_fn=rows.collate)` reads each batch
    as one contiguous tensor. A row that turns out damaged is computed again on the spot.
    """

    def __init__(
        self,
        *,
        source: Source,
        engine: Engine,
        fingerprint_now: Callable[[], Fingerprint],
        folder: Path,
        digests: list[NDArray[np.bytes_]],
        audit: float,
        verify: str,
        started: float,
        sink: Callable[[Event], None] | None,
        name: str,
        has_variants: bool,
        budget_bytes: int | None,
    ) -> None:
        self.fingerprint = fingerprint = fingerprint_now()
        self._fingerprint_now: Callable[[], Fingerprint] | None = fingerprint_now
        self._source = source
        self._engine: Engine | None = engine
        self._folder = folder
        self._variant = 0
        self._all_digests = digests
        self._has_variants = has_variants
        self._budget_bytes = budget_bytes
        self._table = RowTable(folder / fingerprint.digest[:40], fingerprint.digest, verify=verify)
        everything = np.concatenate(digests)
        refuse_forgotten(np.flatnonzero(np.isin(everything, forgotten(folder))) % len(digests[0]))
        hits = int(np.count_nonzero(self._table.locate(everything) >= 0))
        lookup_s = time.perf_counter() - started
        done = self._fill(hits)
        self._slots = [self._table.locate(one) for one in digests]
        rate_s = seconds_per_row(self._table.folder)
        audited, worst = self._audit(audit) if audit and hits else (0, 0.0)
        note_table(self._table.folder, f"features({name})", fingerprint.parts)
        source.release()
        facts = fingerprint.facts
        self.report = Report(
            num_samples=source.num_samples,
            hits=hits,
            computed=done.computed,
            computed_elsewhere=done.computed_elsewhere,
            num_batches=engine.num_batches,
            compute_s=done.seconds,
            saved_s=hits * rate_s,
            lookup_s=lookup_s,
            identity=source.how,
            proof=f"{facts.how}; rows {'compared: ' + facts.unproven if facts.unproven else 'independent'}",  # noqa: E501
            audited=audited,
            audit_worst=worst,
        )
        if hits:
            (sink or book)(
                saved(
                    f"features({name})",
                    fingerprint.digest,
                    seconds=self.report.saved_s,
                    read_s=lookup_s,
                    **occupied(engine.device),
                )
            )

    @property
    def digests(self) -> NDArray[np.bytes_]:
        """The digests of the samples of the present variant: "S16", shape (n,)."""
        return self._all_digests[self._variant]

    @property
    def columns(self) -> tuple[Column, ...]:
        """What a row holds."""
        return self._table.columns

    def __len__(self) -> int:
        return self._source.num_samples

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        values = self._read(np.array([index], np.int64))
        return self._source.selection.join(
            self._named([value[0] for value in values]), self._source.rest(index)
        )

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Read several rows at once; DataLoader calls this."""
        places = np.asarray(indices, np.int64)
        return Batch(self, places)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Any:
        """Return these samples collated: features as one contiguous tensor a column.

        Args:
            indices: Places in the dataset, in any order, repeats allowed.

        Returns:
            What `default_collate` would make of the samples; a ragged output is a list.
        """
        places = np.asarray(indices, np.int64)
        features = self._named(list(self._read(places)))
        return self._source.selection.join(features, self._source.rests(places))

    @staticmethod
    def collate(samples: Any) -> Any:
        """Collate function for a DataLoader over rows."""
        return samples.collated() if isinstance(samples, Batch) else default_collate(samples)

    def set_epoch(self, epoch: int) -> None:
        """Turn to the seeded variant of this epoch, where variants are stored."""
        self._variant = epoch % len(self._all_digests)

    def explain(self) -> dict[str, str]:
        """Return the parts of the subgraph's digest, by name."""
        return dict(self.fingerprint.parts)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are spawned: rows are mapped anew there."""
        state = dict(self.__dict__)
        table: RowTable = state.pop("_table")
        state["_engine"] = state["_fingerprint_now"] = None
        state["_source"] = copy.copy(self._source)
        state["_reopen"] = (table.folder, table.subgraph, table.verify)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder, subgraph, verify = state.pop("_reopen")
        self.__dict__.update(state)
        self._table = RowTable(folder, subgraph, verify=verify)
        self._slots = [self._table.locate(one) for one in self._all_digests]

    # ------------------------------------------------------------ inside

    def _fill(self, hits: int) -> Filled:
        engine = self._engine
        assert engine is not None
        total = Filled()
        facts = self.fingerprint.facts
        num_rows = sum(len(one) for one in self._all_digests)
        if hits < num_rows and facts.unproven and not _was_checked(self._table.folder):
            check_rows_independent(engine, self._source.num_samples)
            write_aside(self._table.folder / "independent", b"compared\n")
        for variant, digests in enumerate(self._all_digests):
            if hits < num_rows:
                for made, origin in self._source.lineage(variant if self._has_variants else None):
                    note_lineage(self._folder, made, origin)
            if len(self._all_digests) > 1:
                engine.call_of = _call_of(self._source, variant)
            done = fill(self._table, self._folder, digests, engine, self._check_budget)
            total.computed += done.computed
            total.computed_elsewhere += done.computed_elsewhere
            total.seconds += done.seconds
        return total

    def _check_budget(self) -> None:
        """Make room for the rows of this module.

        Raises:
            StoreError: They alone need more than the budget.
        """
        if self._budget_bytes is None:
            return
        used = make_room(self._folder, self._budget_bytes, keep=self._table.folder)
        if used > self._budget_bytes:
            num_rows = sum(len(one) for one in self._all_digests)
            raise StoreError(
                f"the {num_rows} rows of this module do not fit a budget of "
                f"{self._budget_bytes:,} bytes: what is there takes {used:,}",
                hint="store fewer bytes a row (storage_dtype=torch.float16, outputs=), or fewer "
                "samples",
            )

    def _read(self, places: NDArray[np.int64]) -> tuple[Any, ...]:
        slots = self._slots[self._variant][places]
        if (slots < 0).any() or len(self._table.damaged(slots)):
            self._heal()
            slots = self._slots[self._variant][places]
            if (slots < 0).any() or len(self._table.damaged(slots)):
                raise StoreError(
                    f"{np.count_nonzero(slots < 0)} rows are missing or damaged, and could not "
                    "be computed again here",
                    hint="a loader's worker process cannot: call features(...) again in the "
                    "main process",
                )
        return self._table.take(slots)

    def _heal(self) -> None:
        """Find or compute what is missing; the damaged rows are forgotten already.

        Raises:
            StoreError: The module or the dataset has changed since.
        """
        self._table.refresh()
        missing = [np.flatnonzero(self._table.locate(one) < 0) for one in self._all_digests]
        if any(map(len, missing)) and self._fingerprint_now is not None:
            self._check_unchanged(missing)
            self._fill(len(self))
        self._slots = [self._table.locate(one) for one in self._all_digests]

    def _check_unchanged(self, missing: list[NDArray[np.int64]]) -> None:
        """Refuse to compute rows under digests that are no longer those of their origin."""
        assert self._fingerprint_now is not None
        changed = self._fingerprint_now().digest != self.fingerprint.digest
        for variant, places in enumerate(missing):
            if len(places) and not changed:
                now = self._source.digests(variant if len(missing) > 1 else None)
                changed = bool((now[places] != self._all_digests[variant][places]).any())
        if changed:
            raise StoreError(
                "rows are missing or damaged, and the module or the dataset is no longer what "
                "they were computed from",
                hint="call features(...) again",
            )

    def _named(self, values: list[Any]) -> Any:
        if len(values) == 1 and self._table.columns[0].name == "":
            return values[0]
        names = [column.name for column in self._table.columns]
        return dict(zip(names, values, strict=True))

    def _audit(self, fraction: float) -> tuple[int, float]:
        """Compute some stored rows again, and compare."""
        engine = self._engine
        assert engine is not None
        num_rows = min(len(self), max(1, round(fraction * len(self))))
        # Which rows are audited must not be foreseeable, nor touch the user's generators.
        chosen = sorted(random.SystemRandom().sample(range(len(self)), num_rows))
        if len(self._all_digests) > 1:
            engine.call_of = _call_of(self._source, self._variant)
        stored = self._read(np.array(chosen, np.int64))
        fresh = engine.rows(self.digests[chosen], chosen)
        worst = compare(fresh, stored)
        if worst > 1.0:
            raise StateMismatchError(
                f"audit: stored rows differ from what the module computes now, by {worst:.3g} "
                f"times the tolerance ({num_rows} rows of {self.fingerprint.digest[:12]})",
                hint="if sample_key(i) or version= is declared, it did not change with what it "
                f"names; otherwise remove {self._table.folder}",
            )
        return num_rows, worst


class Batch(Sequence[Any]):
    """Several samples, read when they are collated; a sequence for any other collate."""

    def __init__(self, rows: FeatureRows, places: NDArray[np.int64]) -> None:
        self._rows = rows
        self._places = places

    def collated(self) -> Any:
        """Return the batch as contiguous tensors."""
        return self._rows.batch(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[int(self._places[index])]


def _call_of(source: Source, variant: int) -> Callable[[int], Any]:
    return lambda index: source.call(index, variant)


def _was_checked(folder: Path) -> bool:
    return (folder / "independent").exists()
