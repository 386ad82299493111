"""Upkeep of the rows in a store: checking all, evicting some, forgetting samples."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trainonce.graph.features import tables
from trainonce.graph.features.fingerprint import write_aside
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.segments import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.tables import Table


@dataclass
class Checked:
    """What checking every row found; `damaged` names segments and how many rows of them."""

    rows: int = 0
    size_bytes: int = 0
    damaged: list[str] = field(default_factory=lambda: [])


def verify(folder: Path, *, heal: bool) -> Checked:
    """Check every row of a row store; damaged ones are removed where `heal`."""
    found = Checked()
    for table in tables.tables(folder):
        for name in table.segments:
            found.size_bytes += tables.size_of(table.folder / name)
            rows, intact = _open(table, name)
            if rows is None:
                found.damaged.append(f"rows {table.folder.name[:16]}/{name}: unreadable")
                if heal:
                    _remove(table.folder / name)
                continue
            found.rows += len(rows.digests_of(name))
            bad = int(np.count_nonzero(~intact))
            if bad:
                found.damaged.append(f"rows {table.folder.name[:16]}/{name}: {bad} rows")
                if heal:
                    rows.rewrite(name, intact)
    for name in tables.damaged_lineage(folder):
        found.damaged.append(f"lineage {name}: what was made from what")
        if heal:
            tables.settle_lineage(folder, name)
    return found


def forget(folder: Path, samples: list[str], files: list[str]) -> tuple[int, int]:
    """Erase all rows and labels of samples, and of what was computed from them.

    Args:
        folder: Of the row store.
        samples: Digests of samples, as hexadecimal digits.
        files: Digests of files whose content samples are.

    Returns:
        How many rows were erased, and how many a full scan still finds (0 is the proof).
    """
    named = [name for name in (*samples, *files) if _is_digest(name)]
    names = {bytes.fromhex(name)[: tables.DIGEST_BYTES] for name in named}
    if not names:
        return 0, 0
    victims = tables.descendants(folder, names)
    tables.bury(folder, victims)  # first: rows that are computed meanwhile are not kept
    gone = np.array(sorted(victims), f"S{tables.DIGEST_BYTES}")
    erased = 0
    for table in tables.tables(folder):
        for name in table.segments:
            rows = _table(table, name)
            keep = ~np.isin(rows.digests_of(name), gone)
            if not keep.all():
                erased += int(np.count_nonzero(~keep))
                rows.rewrite(name, keep)
    left = 0
    for table in tables.tables(folder):
        for name in table.segments:
            left += int(np.count_nonzero(np.isin(_table(table, name).digests_of(name), gone)))
    return erased, left


def make_room(folder: Path, budget_bytes: int, *, keep: Path) -> int:
    """Evict files of rows until a row store fits its budget; return the bytes it then takes.

    What saves the fewest seconds per byte goes first. The table `keep` and those of digests and
    labels stay.
    """
    found = tables.tables(folder)
    total = sum(table.size_bytes for table in found)
    ranked = sorted(
        (table.seconds_per_row * table.num_rows / max(table.size_bytes, 1), table.last_used_s, n)
        for n, table in enumerate(found)
        if table.name and table.folder != keep
    )
    for _, _, number in ranked:
        for name in found[number].segments:
            if total <= budget_bytes:
                return total
            path = found[number].folder / name
            total -= tables.size_of(path)
            _remove(path)
    return total


def sweep(folder: Path) -> int:
    """Remove what writers that died left behind; return how many files there were."""
    removed = 0
    for table in tables.tables(folder):
        rows = _table(table, "none of them")
        with rows.lock():
            removed += rows.sweep()
    return removed


def note_lineage(folder: Path, children: NDArray[np.bytes_], parents: NDArray[np.bytes_]) -> None:
    """Keep which digests were made from which, so that forgetting reaches them."""
    name, data = tables.lineage_file(children, parents)
    path = folder / tables.LINEAGE / name
    if not path.exists():
        write_aside(path, data)


def note_table(folder: Path, name: str, parts: tuple[tuple[str, str], ...]) -> None:
    """Keep what a table is, for `trainonce graph`, and that it was used now."""
    about = folder / tables.ABOUT
    if about.exists():
        with contextlib.suppress(OSError):
            os.utime(about)
    elif folder.exists():
        write_aside(about, tables.note(folder, name, parts))


def _open(table: Table, name: str) -> tuple[RowTable | None, NDArray[np.bool_]]:
    """Return a segment as a table, and which of its rows are intact."""
    try:
        fd = os.open(table.folder / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, np.ones(0, np.bool_)
    try:
        if not table.subgraph or read_header(fd, table.subgraph) is None:
            return None, np.ones(0, np.bool_)
    finally:
        os.close(fd)
    rows = _table(table, name)
    return rows, rows.check_all(name)


def _table(table: Table, name: str) -> RowTable:
    return RowTable(table.folder, table.subgraph, only=name)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _is_digest(text: str) -> bool:
    return len(text) in (32, 64) and all(letter in "0123456789abcdef" for letter in text)
