"""Taking over what dead writers left in their side files."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from trainonce.errors import LedgerError
from trainonce.ledger import database
from trainonce.ledger.intake import FOLDER, claim, read_side_file, side_files

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path


def take_over(
    connection: sqlite3.Connection, home: Path, tell: Callable[[str], None], *, skip: str = ""
) -> None:
    """Move the events of dead writers from their side files into the database.

    Args:
        connection: The ledger, open for writing.
        home: The folder of the ledger.
        tell: Called with one line for what could not be read.
        skip: A writer whose file is left alone: the caller's own.
    """
    for path in side_files(home / FOLDER):
        if path.stem == skip:
            continue
        # Another process may take it over and remove it at any moment.
        with contextlib.suppress(FileNotFoundError):
            _take_over_one(connection, path, tell)


def _take_over_one(connection: sqlite3.Connection, path: Path, tell: Callable[[str], None]) -> None:
    try:
        with claim(path) as found:
            if found is None:
                return
            if found.writer is not None and found.entries:
                database.write(connection, found.writer, found.entries)
            if found.torn:
                aside = path.with_suffix(".torn")
                path.rename(aside)
                tell(f"{found.torn} lines of {path.name} cannot be read; kept as {aside}")
            else:
                path.unlink()
    except (LedgerError, PermissionError, KeyError, TypeError) as error:
        tell(f"{path} was left as it is: {error}")


def read_into(connection: sqlite3.Connection, home: Path, tell: Callable[[str], None]) -> None:
    """Add what side files hold to a private copy of the ledger; leave the files alone."""
    for path in side_files(home / FOLDER):
        try:
            found = read_side_file(path)
        except (LedgerError, OSError, KeyError, TypeError) as error:
            tell(f"{path} was not read: {error}")
            continue
        if found.writer is not None and found.entries:
            database.write(connection, found.writer, found.entries)
