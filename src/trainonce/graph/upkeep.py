"""Upkeep of a store: eviction, collection, checking, and forgetting on request."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainonce.graph.features import tables
from trainonce.graph.leases import is_dead

if TYPE_CHECKING:
    from pathlib import Path

    from trainonce.graph.features.tables import Table
    from trainonce.graph.index import Entry
    from trainonce.graph.store import Store

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass
class Collected:
    """What a collection removed; segments are files of rows."""

    blobs: int = 0
    segments: int = 0
    size_bytes: int = 0
    temporary_files: int = 0
    left_bytes: int = 0


@dataclass
class Verified:
    """What a full check found. `damaged` names blobs whose bytes or rows do not fit."""

    blobs: int = 0
    size_bytes: int = 0
    entries: int = 0
    rows: int = 0
    damaged: list[str] = field(default_factory=lambda: [])
    missing: list[str] = field(default_factory=lambda: [])


@dataclass
class Forgotten:
    """What was erased on request.

    Args:
        entries: Results that were erased, the nodes by name and key.
        descendants: Names of the nodes that were made from the source, trained models included.
        rows: Rows of features and labels that were erased.
        tombstones: Digests that will not be served or kept again.
        left: Results and rows of this source that a full scan still found: 0 is the proof.
        doubtful: Damaged files that told what was made from what: rows may have been missed.
    """

    entries: list[str] = field(default_factory=lambda: [])
    descendants: list[str] = field(default_factory=lambda: [])
    rows: int = 0
    tombstones: list[str] = field(default_factory=lambda: [])
    left: int = 0
    doubtful: list[str] = field(default_factory=lambda: [])


def evict(store: Store, budget_bytes: int) -> Collected:
    """Remove bytes until the store fits its budget; entries stay.

    What saves the fewest seconds per byte goes first, blobs and files of rows alike, and of
    equal ones the longest unused. Pinned blobs stay, unless the process that pinned them is
    gone. Rows that a process has mapped stay readable there.
    """
    done = Collected()
    segments = _segments(store)
    with store.index.db.transaction() as connection:
        total = connection.execute("SELECT coalesce(sum(size_bytes), 0) FROM stored").fetchone()[0]
        total += sum(size for _, _, size, _ in segments)
        if total > budget_bytes:
            pinned = _pinned(store)
            rows = connection.execute(
                "SELECT s.blob, s.size_bytes, coalesce(sum(a.seconds), 0) / max(s.size_bytes, 1), "
                "max(coalesce(a.last_used, 0)) FROM stored s LEFT JOIN actions a ON a.blob=s.blob "
                "GROUP BY s.blob"
            ).fetchall()
            ranked: list[tuple[float, float, int, str | Path]] = [
                (worth, used, size, blob) for blob, size, worth, used in rows if blob not in pinned
            ]
            for _, _, size, what in sorted([*ranked, *segments], key=lambda one: one[:2]):
                if total <= budget_bytes:
                    break
                if isinstance(what, str):
                    store.blobs.remove(what)
                    connection.execute("DELETE FROM stored WHERE blob=?", (what,))
                    done.blobs += 1
                else:
                    what.unlink(missing_ok=True)
                    done.segments += 1
                total -= size
                done.size_bytes += size
    done.left_bytes = total
    return done


def collect(store: Store, budget_bytes: int | None = None) -> Collected:
    """Remove what nothing refers to, what dead processes left, and what exceeds the budget."""
    done = Collected(temporary_files=store.blobs.sweep())
    if rows_of(store):
        from trainonce.graph.features.upkeep import sweep

        done.temporary_files += sweep(rows_folder(store))
    with store.index.db.transaction() as connection:
        pinned = _pinned(store)
        rows = connection.execute("SELECT DISTINCT blob FROM actions").fetchall()
        wanted = {row[0] for row in rows} | pinned
        for name in list(store.blobs.names()):
            size = store.blobs.size_of(name)
            if name not in wanted:
                store.blobs.remove(name)
                connection.execute("DELETE FROM stored WHERE blob=?", (name,))
                done.blobs += 1
                done.size_bytes += size
            else:
                connection.execute("INSERT OR REPLACE INTO stored VALUES (?,?)", (name, size))
        holders = {row[0] for row in connection.execute("SELECT DISTINCT holder FROM pins")}
        for holder in filter(is_dead, holders):
            connection.execute("DELETE FROM pins WHERE holder=?", (holder,))
    store.journal.rewrite(store.index)
    budget = budget_bytes if budget_bytes is not None else store.budget_bytes
    evicted = evict(store, budget if budget is not None else 1 << 62)
    done.blobs += evicted.blobs
    done.segments = evicted.segments
    done.size_bytes += evicted.size_bytes
    done.left_bytes = evicted.left_bytes
    return done


def verify(store: Store, *, heal: bool = True) -> Verified:
    """Read every blob and row and check them; damaged ones are removed where `heal`.

    What is damaged is a miss from then on, and is written again when it is next computed.
    """
    found = Verified()
    present: set[str] = set()
    for name in list(store.blobs.names()):
        found.blobs += 1
        found.size_bytes += store.blobs.size_of(name)
        store.blobs.doubt(name)
        if store.blobs.get(name, heal=heal) is None:
            found.damaged.append(name)
        else:
            present.add(name)
    damaged_rows = store.index.damaged()
    found.damaged += damaged_rows
    if heal and damaged_rows and not store.read_only:
        store.index.remove(damaged_rows)
    if rows_of(store):
        from trainonce.graph.features.upkeep import verify as verify_rows

        checked = verify_rows(rows_folder(store), heal=heal and not store.read_only)
        found.rows = checked.rows
        found.size_bytes += checked.size_bytes
        found.damaged += checked.damaged
    for entry in store.index.entries():
        found.entries += 1
        if entry.blob and entry.blob not in present:
            found.missing.append(entry.key)
    return found


def forget(
    store: Store, *, sources: list[str] | None = None, samples: list[str] | None = None
) -> Forgotten:
    """Erase every result that was made from a source or a sample, and keep it from returning.

    Args:
        store: The store; its shared half is erased as well.
        sources: Digests of files, folders or values, or paths as they were given to a node.
        samples: Digests of samples: 32 hexadecimal digits, as `rows.digests` holds them.
    """
    done = Forgotten()
    wanted = _digests_of(store, sources or [])
    victims = _descendants(store, wanted)
    for entry in victims:
        done.entries.append(f"{entry.node} {entry.key[:16]}")
        done.descendants.append(entry.node)
    # A path may be used again for something else, so that only digests are kept away.
    digests = {name for name in wanted if _DIGEST.fullmatch(name)}
    buried = sorted(digests | {entry.key for entry in victims} | set(samples or []))
    _bury(store, buried, [] if store.tenant_key else sources or samples or [])
    done.tombstones = buried
    _erase(store, victims)
    done.left = len(_descendants(store, wanted))
    if rows_of(store):
        from trainonce.graph.features.upkeep import forget as forget_rows

        done.doubtful = tables.damaged_lineage(rows_folder(store))
        done.rows, left = forget_rows(rows_folder(store), samples or [], sorted(digests))
        done.left += left
    done.descendants = sorted(set(done.descendants))
    return done


def rows_folder(store: Store) -> Path:
    """Return the folder in which features keep their rows beside this store's blobs."""
    return store.root / "rows"


def rows_of(store: Store) -> list[Table]:
    """Return the tables of rows beside this store's blobs."""
    return tables.tables(rows_folder(store))


def tombstones(store: Store) -> list[tuple[str, str, float]]:
    """Return what was forgotten: digest, what it was, and when (seconds since the epoch)."""
    rows = store.index.db.read("SELECT digest, what, wall_s FROM tombstones ORDER BY wall_s")
    return [(str(a), str(b), float(c)) for a, b, c in rows]


def _segments(store: Store) -> list[tuple[float, float, int, Path]]:
    """Return the files of rows: seconds saved per byte, last use, bytes, and the file.

    Tables of digests and labels are small, and everything else is found by them: they go last.
    """
    found: list[tuple[float, float, int, Path]] = []
    for table in rows_of(store):
        for name in table.segments:
            path = table.folder / name
            worth = table.seconds_per_row * table.num_rows / max(table.size_bytes, 1)
            worth = worth if table.name else float("inf")
            found.append((worth, table.last_used_s, tables.size_of(path), path))
    return found


def _pinned(store: Store) -> set[str]:
    rows = store.index.db.read("SELECT blob, holder FROM pins")
    return {blob for blob, holder in rows if not is_dead(holder)}


def _digests_of(store: Store, sources: list[str]) -> set[str]:
    """Return the digests that sources had, where some are given as paths."""
    wanted = set(sources)
    for entry in store.index.entries():
        wanted |= {digest for path, digest in entry.sources.items() if path in sources}
    return wanted | {store.bind(name) for name in sources}


def _descendants(store: Store, wanted: set[str]) -> list[Entry]:
    entries = store.index.entries()
    reached = set(wanted)
    victims: dict[str, Entry] = {}
    grown = True
    while grown:
        grown = False
        for entry in entries:
            if entry.key in victims:
                continue
            names = {entry.key, *(name for _, name in entry.lineage), *entry.sources}
            if names & reached:
                victims[entry.key] = entry
                # What it gave may have gone on as a plain value.
                reached |= {entry.key, entry.output}
                grown = True
    return list(victims.values())


def _bury(store: Store, digests: list[str], what: list[str]) -> None:
    text = ", ".join(what)
    rows = [(digest, text, time.time()) for digest in digests]
    store.journal.bury(rows)
    with store.index.db.transaction(durable=True) as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO tombstones VALUES (?,?,?)",
            rows,
        )
    if store.remote is not None:
        for digest in digests:
            store.remote.bury(digest, text)


def _erase(store: Store, victims: list[Entry]) -> None:
    store.index.remove([entry.key for entry in victims])
    kept = {entry.blob for entry in store.index.entries()}
    for entry in victims:
        if entry.blob and entry.blob not in kept:
            store.blobs.remove(entry.blob)
            with store.index.db.transaction() as connection:
                connection.execute("DELETE FROM stored WHERE blob=?", (entry.blob,))
        if store.remote is not None:
            store.remote.remove(entry.key, entry.blob if entry.blob not in kept else "")
