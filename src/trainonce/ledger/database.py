"""The ledger's SQLite file: format, opening, writing, and what to do with a damaged one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import sqlite3
import time
from typing import TYPE_CHECKING

from trainonce.errors import LedgerError
from trainonce.ledger.filesystem import network_filesystem
from trainonce.ledger.identity import Writer
from trainonce.ledger.intake import Entry
from trainonce.sqlite import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

FORMAT = 1
_APPLICATION = 0x594F434F  # "YOCO"
_BUSY_S = 5.0
_LOCK_S = 10.0
# Above this a check at every start costs seconds; damage then shows when a page is read.
_CHECK_LIMIT_BYTES = 256 << 20

_SCHEMA = """
CREATE TABLE writers (
    writer TEXT PRIMARY KEY, host TEXT NOT NULL, machine TEXT NOT NULL,
    pid INTEGER NOT NULL, started TEXT NOT NULL
);
CREATE TABLE events (
    job TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, wall_s REAL NOT NULL,
    record TEXT NOT NULL, writer TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (job, seq), UNIQUE (writer, n)
);
CREATE INDEX events_by_kind ON events (job, kind, seq, wall_s);
"""


class DamagedError(LedgerError):
    """The file is there, and it is not a readable database."""


def is_damage(error: BaseException) -> bool:
    """Tell whether `error` says that the file itself is broken."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, DamagedError) or code in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    )


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger at `path` for reading and writing; make it where there is none.

    Raises:
        DamagedError: The file is no readable database.
        LedgerError: A newer version wrote it, or it belongs to something else.
        sqlite3.Error: It cannot be opened, or is locked.
        OSError: Its folder cannot be used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _folder_lock(path.parent):  # two that make one ledger at once would clash
        # `isolation_level=None`: transactions begin and end where the code says so.
        connection = sqlite3.connect(
            path, timeout=_BUSY_S, isolation_level=None, factory=Connection
        )
        try:
            _check(connection, path)
            _set_journal(connection, path.parent)
            if _version(connection) == 0:
                create(connection)
        except sqlite3.DatabaseError as error:
            connection.close()
            if is_damage(error):
                raise DamagedError(f"{path} is damaged: {error}") from error
            raise
        except LedgerError:
            connection.close()
            raise
    return connection


def connect_copy(path: Path, scratch: Path) -> sqlite3.Connection:
    """Open a copy of the ledger, for a folder in which nothing can be written.

    SQLite wants to write beside a WAL database even to read it.

    Raises:
        LedgerError: A newer version wrote it, or it is damaged.
        OSError: It cannot be read.
    """
    copy = scratch / path.name
    for attempt in range(3):
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            target = copy.with_name(copy.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                target.write_bytes(source.read_bytes())
        try:
            return connect(copy)
        except DamagedError:
            # A checkpoint may have run between the two reads.
            if attempt == 2:
                raise
            for leftover in scratch.glob(path.name + "*"):
                leftover.unlink()
    raise AssertionError("unreachable")


def write(connection: sqlite3.Connection, writer: Writer, entries: Sequence[Entry]) -> int:
    """Write `entries` in one transaction; those already there are passed over.

    Returns:
        How many were new.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            "INSERT OR IGNORE INTO writers VALUES (:writer, :host, :machine, :pid, :started)",
            dataclasses.asdict(writer),
        )
        before = connection.total_changes
        connection.executemany(
            "INSERT OR IGNORE INTO events (job, seq, kind, wall_s, record, writer, n) "
            "SELECT :job, coalesce(max(seq), 0) + 1, :kind, :wall_s, :record, :writer, :n "
            "FROM events WHERE job = :job",
            [{**dataclasses.asdict(entry), "writer": writer.writer} for entry in entries],
        )
        added = connection.total_changes - before
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    return added


def replace_damaged(path: Path, tell: Callable[[str], None]) -> None:
    """Move a damaged ledger aside, begin a new one, and bring over what can still be read.

    Does nothing where another process has already done so.
    """
    with _folder_lock(path.parent):
        if not _still_damaged(path):
            return
        aside = _free_name(path)
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path.with_name(path.name + suffix), aside.with_name(aside.name + suffix))
    recovered = 0
    try:
        with contextlib.closing(connect(path)) as new:
            for writer, entries in _readable(aside):
                recovered += write(new, writer, entries)
    finally:
        tell(
            f"the ledger {path} was damaged; it was moved to {aside.name}, a new one was begun, "
            f"and {recovered} events that could still be read were taken over"
        )


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse what is not a ledger that this version may write."""
    version = _version(connection)
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != _APPLICATION:
        raise LedgerError(
            f"{path} is a database of something else",
            hint="move it away, or set TRAINONCE_HOME to another folder",
        )
    if version > FORMAT:
        raise LedgerError(
            f"{path} has format {version}, this version reads up to {FORMAT}",
            hint="upgrade trainonce, or set TRAINONCE_HOME to another folder",
        )
    if path.stat().st_size <= _CHECK_LIMIT_BYTES:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise DamagedError(f"{path} is damaged: {verdict}")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _set_journal(connection: sqlite3.Connection, folder: Path) -> None:
    # FULL: a commit is on the disk when it returns. It costs one sync for each batch, on a
    # thread nobody waits for, and keeps the last incident when the power goes (with NORMAL
    # a WAL database would be whole, and short of it).
    mode = "DELETE" if network_filesystem(folder) else "WAL"
    connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.execute("PRAGMA synchronous = FULL")


def create(connection: sqlite3.Connection) -> None:
    """Lay the tables of an empty ledger."""
    connection.executescript(
        f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {_APPLICATION}; "
        f"PRAGMA user_version = {FORMAT}; COMMIT;"
    )


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Generator[None]:
    """Hold the folder's lock file; go on without it where there are no locks."""
    fd = os.open(folder / "ledger.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Never wait for ever: the holder may have been stopped.
                if time.monotonic() > deadline:
                    message = f"another process holds {folder / 'ledger.lock'}"
                    raise TimeoutError(errno.ETIMEDOUT, message) from None
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(fd)


def _still_damaged(path: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
            return connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok"
    except sqlite3.DatabaseError as error:
        return is_damage(error)


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while True:
        name = f"{path.name}.damaged-{stamp}" + (f"-{number}" if number else "")
        if not path.with_name(name).exists():
            return path.with_name(name)
        number += 1


def _readable(path: Path) -> Iterator[tuple[Writer, list[Entry]]]:
    """Yield what a damaged file still gives, from its beginning and from its end."""
    writers: dict[str, Writer] = {}
    rows: dict[tuple[str, int], tuple[str, Entry]] = {}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        with contextlib.suppress(sqlite3.DatabaseError):
            for row in connection.execute("SELECT * FROM writers"):
                fields = zip(("writer", "host", "machine", "pid", "started"), row, strict=True)
                writers[row[0]] = Writer(**dict(fields))
        for order in ("ASC", "DESC"):
            with contextlib.suppress(sqlite3.DatabaseError):
                for job, kind, wall_s, record, writer, n in connection.execute(
                    "SELECT job, kind, wall_s, record, writer, n FROM events NOT INDEXED "
                    f"ORDER BY rowid {order}"
                ):
                    entry = Entry(n=n, job=job, kind=kind, wall_s=wall_s, record=record)
                    rows[writer, n] = (writer, entry)
    grouped: dict[str, list[Entry]] = {}
    for writer, entry in sorted(rows.values(), key=lambda row: row[1].wall_s):
        grouped.setdefault(writer, []).append(entry)
    for name, entries in grouped.items():
        unknown = Writer(writer=name, host="", machine="", pid=0, started="")
        yield writers.get(name, unknown), entries
