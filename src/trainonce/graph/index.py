"""The index: which action gave which output, what it cost, and what it was made of.

An entry outlives its blob: its output digest stays authoritative after an eviction, so that
what lies downstream still hits, and a re-evaluation that differs is noticed. Every row carries
a checksum over its fields (under a tenant's key, a keyed one), so that a damaged or forged row
is a miss.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trainonce.errors import StoreError
from trainonce.graph import leases
from trainonce.graph.db import Database
from trainonce.graph.digest import digest_bytes

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable
    from pathlib import Path

FORMAT = 1
_NUMBERED = re.compile(r"index-(\d+)\.db")

SCHEMA = (
    leases.SCHEMA
    + """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS actions(
    key TEXT PRIMARY KEY, node TEXT NOT NULL, blob TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    seconds REAL NOT NULL, record TEXT NOT NULL, seal TEXT NOT NULL,
    last_used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS actions_by_node ON actions(node);
CREATE INDEX IF NOT EXISTS actions_by_blob ON actions(blob);
CREATE TABLE IF NOT EXISTS stored(
    blob TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pins(
    blob TEXT NOT NULL, holder TEXT NOT NULL, PRIMARY KEY (blob, holder)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uncached(
    node TEXT PRIMARY KEY, reason TEXT NOT NULL, wall_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tombstones(
    digest TEXT PRIMARY KEY, what TEXT NOT NULL, wall_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files(
    path TEXT PRIMARY KEY, stat TEXT NOT NULL, digest TEXT NOT NULL, seal TEXT NOT NULL
    ) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses(id INTEGER PRIMARY KEY CHECK (id = 1), count INTEGER NOT NULL);
INSERT OR IGNORE INTO uses VALUES (1, 0);
"""
)


@dataclass(frozen=True)
class Entry:
    """What is known of one action.

    Args:
        key: The action key.
        node: Name of the node.
        output: Digest of the result's value.
        blob: Name of the blob that holds it; empty where the result has no encoding.
        size_bytes: Of the blob.
        seconds: How long the evaluation took.
        parts: Field of the key -> digest, for `why`.
        shown: Field of the key -> how it is shown to people.
        lineage: What went in: pairs of a kind ("file", "dir", "value", "node") and a digest; a
            node is named by its action key.
        sources: Path of a file or folder that went in -> its digest.
        nondeterministic: A re-evaluation gave other bytes; this is the newest output.
        numerics: "exact" or "tolerant".
        wall_s: When, for showing.
    """

    key: str
    node: str
    output: str
    blob: str = ""
    size_bytes: int = 0
    seconds: float = 0.0
    parts: dict[str, str] = field(default_factory=lambda: {})
    shown: dict[str, str] = field(default_factory=lambda: {})
    lineage: list[tuple[str, str]] = field(default_factory=lambda: [])
    sources: dict[str, str] = field(default_factory=lambda: {})
    nondeterministic: bool = False
    numerics: str = "tolerant"
    wall_s: float = 0.0


def index_path(root: Path, *, after: Path | None = None) -> Path:
    """Return the index of a store: the newest of `index.db`, `index-1.db`, `index-2.db`...

    Args:
        root: Folder of the store.
        after: Return the one to be made after this one instead.
    """
    numbers = [int(m[1]) for p in root.glob("index-*.db") if (m := _NUMBERED.fullmatch(p.name))]
    number = max(numbers, default=0)
    if after is not None:
        number += 1
    return root / (f"index-{number}.db" if number else "index.db")


class Index:
    """The entries of one store, in the SQLite file that also holds its claims.

    Args:
        path: The file.
        key: A tenant's 32-byte key, which seals the rows.
        read_only: Never write.

    Raises:
        StoreError: The file is damaged, or a newer version of TrainOnce made it.
    """

    def __init__(self, path: Path, *, key: bytes | None = None, read_only: bool = False) -> None:
        self.db = Database(path, SCHEMA, read_only=read_only)
        self._key = key
        self._read_only = read_only
        self._check_format()

    def refill(self, entries: Iterable[Entry], tombstones: dict[str, tuple[str, float]]) -> None:
        """Write what a journal holds into a new index.

        Fencing tokens go on above all that were ever given, so that nobody's old claim fits.
        """
        with self.db.transaction(durable=True) as connection:
            connection.execute("UPDATE fence SET token=?", (abs(time.time_ns()),))
            for entry in entries:
                self.write(connection, entry)
                if entry.blob:
                    connection.execute(
                        "INSERT OR REPLACE INTO stored VALUES (?,?)",
                        (entry.blob, entry.size_bytes),
                    )
            connection.executemany(
                "INSERT OR REPLACE INTO tombstones VALUES (?,?,?)",
                [(digest, what, wall_s) for digest, (what, wall_s) in tombstones.items()],
            )

    def get(self, key: str) -> Entry | None:
        """Return the entry of an action key, or None where there is none that is intact."""
        rows = self.db.read(f"SELECT {_COLUMNS} FROM actions WHERE key=?", (key,))
        return self._entry(rows[0]) if rows else None

    def write(self, connection: sqlite3.Connection, entry: Entry) -> None:
        """Write an entry within a transaction; one of the same key is replaced."""
        record = json.dumps(asdict(entry), sort_keys=True)
        connection.execute("UPDATE uses SET count=count+1")
        connection.execute(
            "INSERT OR REPLACE INTO actions SELECT ?,?,?,?,?,?,?, count FROM uses",
            (entry.key, entry.node, entry.blob, entry.size_bytes, entry.seconds, record,
             self.seal(record)),
        )  # fmt: skip

    def touch(self, key: str) -> None:
        """Note that an entry was used, for the order of eviction."""
        if not self._read_only:
            with self.db.transaction() as connection:
                connection.execute("UPDATE uses SET count=count+1")
                connection.execute(
                    "UPDATE actions SET last_used=(SELECT count FROM uses) WHERE key=?", (key,)
                )

    def entries(self, node: str | None = None) -> list[Entry]:
        """Return all intact entries, or those of one node, the most recently used first."""
        where, values = ("WHERE node=?", (node,)) if node is not None else ("", ())
        rows = self.db.read(
            f"SELECT {_COLUMNS} FROM actions {where} ORDER BY last_used DESC", values
        )
        return [entry for row in rows if (entry := self._entry(row)) is not None]

    def find(self, prefix: str) -> list[Entry]:
        """Return the entries whose key begins with `prefix`."""
        rows = self.db.read(
            f"SELECT {_COLUMNS} FROM actions WHERE substr(key, 1, ?)=?", (len(prefix), prefix)
        )
        return [entry for row in rows if (entry := self._entry(row)) is not None]

    def last_seconds(self, node: str) -> float | None:
        """Return how long the most recently used result of a node took, or None."""
        rows = self.db.read(
            "SELECT seconds FROM actions WHERE node=? ORDER BY last_used DESC LIMIT 1", (node,)
        )
        return rows[0][0] if rows else None

    def damaged(self) -> list[str]:
        """Return the keys of rows that are not intact."""
        rows = self.db.read(f"SELECT {_COLUMNS} FROM actions")
        return [str(row[0]) for row in rows if self._entry(row) is None]

    def remove(self, keys: list[str]) -> None:
        """Remove entries."""
        with self.db.transaction(durable=True) as connection:
            connection.executemany("DELETE FROM actions WHERE key=?", [(key,) for key in keys])

    def seal(self, text: str) -> str:
        """Return the checksum of a row, keyed where the store belongs to a tenant."""
        return digest_bytes(text.encode(), key=self._key)

    def _entry(self, row: tuple[Any, ...]) -> Entry | None:
        key, record, seal = row
        if not isinstance(record, str) or self.seal(record) != seal:
            return None
        values = json.loads(record)
        values["lineage"] = [(kind, name) for kind, name in values["lineage"]]
        known = {f.name for f in fields(Entry)}
        entry = Entry(**{name: value for name, value in values.items() if name in known})
        return entry if entry.key == key else None

    def _check_format(self) -> None:
        if not self._read_only:
            with self.db.transaction() as connection:
                connection.execute(
                    "INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(FORMAT),)
                )
        found = self.db.read("SELECT value FROM meta WHERE name='format'")
        if found and found[0][0] != str(FORMAT):
            raise StoreError(
                f"{self.db.path} has format {found[0][0]}, and this version reads format {FORMAT}",
                hint="use the newer trainonce that wrote it, or another store",
            )


_COLUMNS = "key, record, seal"
