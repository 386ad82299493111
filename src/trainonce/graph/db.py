"""SQLite connections that survive threads, forks and crowds of processes.

One file in WAL mode holds the claims and the index, so that a result and the end of its claim
are one transaction. WAL needs shared memory between its users, so the file must lie on a local
file system; `store` detects the others.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
from typing import TYPE_CHECKING

from trainonce.errors import DamagedError, StoreError
from trainonce.sqlite import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

BUSY_S = 120.0
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class Database:
    """One SQLite file; every thread of every process gets its own connection.

    Args:
        path: The file. Its folder exists.
        schema: Statements that create what is missing; run once for each connection made.
        read_only: Never write; the file must exist.
    """

    def __init__(self, path: Path, schema: str, *, read_only: bool = False) -> None:
        self.path = path.resolve()  # claims are told apart by it
        self.read_only = read_only
        # Is asked to make the file anew where it turns out damaged; returns the path to use.
        self.repair: Callable[[Path], Path] | None = None
        self._schema = schema
        self._local = threading.local()

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection, made anew after a fork.

        Raises:
            StoreError: The file cannot be opened, or is no database.
        """
        held: tuple[int, Path, sqlite3.Connection] | None = getattr(self._local, "held", None)
        if held is None or held[:2] != (os.getpid(), self.path):
            try:
                opened = self._open()
            except DamagedError as error:
                if not self._try_repair(error):
                    raise
                opened = self._open()
            held = (os.getpid(), self.path, opened)
            self._local.held = held
        return held[2]

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Generator[sqlite3.Connection]:
        """Run a block as one write transaction, all of it or nothing.

        Args:
            durable: Return only when it would survive a power failure.

        Raises:
            StoreError: Another process held the write lock for too long, or the disk is full.
        """
        connection = self.connection()
        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        try:
            self._begin(connection)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            explained = self._explain(error)
            self._try_repair(explained)
            raise explained from error

    def read(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple]:
        """Return all rows of a query.

        Raises:
            StoreError: The file is damaged or cannot be read.
        """
        try:
            return self.connection().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            explained = self._explain(error)
            if self._try_repair(explained):
                return self.connection().execute(statement, values).fetchall()
            raise explained from error

    def close(self) -> None:
        """Close this thread's connection."""
        held = getattr(self._local, "held", None)
        if held is not None and held[0] == os.getpid():
            held[2].close()
        self._local.held = None

    def _try_repair(self, error: StoreError) -> bool:
        """Go over to a new file where this one is damaged; tell whether there is one."""
        if not isinstance(error, DamagedError) or self.repair is None:
            return False
        repaired = self.repair(self.path)
        moved, self.path = repaired != self.path, repaired
        return moved

    def _begin(self, connection: sqlite3.Connection) -> None:
        # SQLite's own busy handler sleeps in growing steps that starve some of a crowd.
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.0005, 0.005))

    def _open(self) -> sqlite3.Connection:
        try:
            if not self.read_only:
                connection = self._connect("mode=rwc")
                self._prepare(connection)
                return connection
            try:
                return self._probed(self._connect("mode=ro"))
            except sqlite3.OperationalError:
                # Reading a log needs a writable folder; where there is none, nobody writes.
                return self._probed(self._connect("mode=ro&immutable=1"))
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _connect(self, options: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{_quoted(self.path)}?{options}",
            uri=True,
            timeout=5.0,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )

    def _probed(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(self._schema)
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.001, 0.01))

    def _explain(self, error: sqlite3.Error) -> StoreError:
        hint = None
        if "full" in str(error) or "disk I/O" in str(error):
            hint = "free some space, or give the store a smaller budget"
        text = f"the index {self.path} cannot be used: {error}"
        code = getattr(error, "sqlite_errorcode", None)
        if code in _DAMAGE or "no such" in str(error) or "malformed" in str(error):
            hint = "open the store for writing: its index is then made again from its journal"
            return DamagedError(text, hint=hint)
        return StoreError(text, hint=hint)


def _is_busy(error: sqlite3.Error) -> bool:
    return "locked" in str(error) or "busy" in str(error)


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
