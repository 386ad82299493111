"""The ledger: a durable record of events that never holds up the job it records.

`append` hands an event to the side file (a write to the page cache: it survives SIGKILL) and
to a thread that writes the database. Whatever goes wrong there (a full disk, a locked or
damaged file, a newer format) is said once through `on_error`, and the events wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sqlite3
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce import settings
from trainonce.errors import LedgerError
from trainonce.ledger import database, leftovers
from trainonce.ledger.filesystem import network_filesystem
from trainonce.ledger.identity import this_writer
from trainonce.ledger.intake import FOLDER, Entry, Intake
from trainonce.ledger.reading import JobSummary, Unknown, View
from trainonce.sqlite import no_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from trainonce.events import Event

_log = logging.getLogger(__name__)
_BATCH = 500
_RETRY_S = 2.0
_READ_WAIT_S = 10.0
_CLEAR_BYTES = 1 << 20  # the side file is emptied when it has grown to this


class Ledger:
    """The ledger of one TrainOnce home. Made by `Ledger.open`. Thread-safe.

    Args:
        home: The folder that holds `ledger.sqlite`.
        on_error: Called with one line when something is wrong, once for each trouble, from
            the ledger's own thread or from `close`, `jobs` and `events`.
        max_pending: How many events wait at most while the database cannot be written.
            Above it further samples of progress are dropped and counted; nothing else is.
    """

    def __init__(self, home: Path, on_error: Callable[[str], None], max_pending: int) -> None:
        self.home = home
        self.path = home / "ledger.sqlite"
        self._on_error = on_error
        self._max_pending = max_pending
        self._writer = this_writer()
        self._changed = threading.Condition()
        self._pending: deque[Entry] = deque()  # guarded by _changed, as is all up to _closed
        self._kept = 0  # the first so many of _pending are in the side file
        self._n = 0
        self._dropped = 0
        self._closing = False
        self._intake: Intake | None = None
        self._inline = not network_filesystem(home)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._told: set[str] = set()
        self._troubles: set[str] = set()  # what keeps the database from being written
        self._connection: sqlite3.Connection | None = None  # the thread's own
        self._file: tuple[int, int] = (0, 0)
        self._unknown = Unknown()

    @classmethod
    def open(
        cls,
        home: Path | None = None,
        *,
        on_error: Callable[[str], None] | None = None,
        max_pending: int = 100_000,
    ) -> Ledger:
        """Return the ledger in `home` (`TRAINONCE_HOME` by default).

        Touches no file and raises nothing: the first `append` or reading does the work.
        """
        return cls(home or settings.home(), on_error or _log.warning, max_pending)

    def append(self, job: str, event: Event) -> None:
        """Record `event`. Returns in microseconds and raises nothing.

        On a local disk the event survives SIGKILL of this process once this returns; a
        moment later, when the database has it, also a loss of power. An event without a
        time gets the present one.
        """
        try:
            if not event.wall_s:
                event = dataclasses.replace(event, wall_s=time.time(), mono_s=time.monotonic())
            record = json.dumps(event.to_record(), separators=(",", ":"))
        except (TypeError, ValueError) as error:
            self._tell("encoding", f"an event of kind {event.kind!r} cannot be kept: {error}")
            return
        with self._changed:
            if self._closing:
                return self._tell("closed", f"{event.kind!r} came after the ledger was closed")
            if len(self._pending) >= self._max_pending and event.kind == "progress":
                self._dropped += 1
                return None
            self._n += 1
            entry = Entry(n=self._n, job=job, kind=event.kind, wall_s=event.wall_s, record=record)
            self._pending.append(entry)
            if self._inline:
                # Over a network even a write to the cache may hang: there the thread does it.
                self._keep_pending()
            self._start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until the database has all events appended so far; tell whether it has."""
        with self._changed:
            last = self._n
            return self._changed.wait_for(
                lambda: not self._pending or self._pending[0].n > last, timeout_s
            )

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what waits, and stop. What cannot be written stays in the side file."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._changed:
            self._closed = True
            waiting, kept = len(self._pending), self._kept
            if kept < waiting:
                self._tell("lost", f"{waiting - kept} events could not be written anywhere")
            if kept:
                self._tell("left", f"{kept} events wait in {self._intake_path()} for next time")
            if self._dropped:
                self._tell("dropped", f"{self._dropped} samples of progress were dropped")
            if self._intake is not None:
                self._intake.close(keep=waiting > 0)
                self._intake = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def num_unknown(self) -> int:
        """How many rows the last reading passed over because a newer version wrote them."""
        return self._unknown.count

    def jobs(self) -> list[JobSummary]:
        """Return one summary a job, newest first.

        Raises:
            LedgerError: The ledger cannot be read, or a newer version wrote it.
        """
        with self.reading() as view:
            return view.jobs()

    def events(self, job: str, kind: str | None = None) -> Iterator[Event]:
        """Yield the events of `job` in order, all or of one kind.

        Kinds that a newer version wrote are passed over and counted in `num_unknown`.

        Raises:
            LedgerError: The ledger cannot be read, or a newer version wrote it.
        """
        with self.reading() as view:
            yield from view.events(job, kind)

    @contextlib.contextmanager
    def reading(self) -> Generator[View]:
        """Open the ledger once for several questions.

        Raises:
            LedgerError: The ledger cannot be read, or a newer version wrote it.
        """
        self._unknown = Unknown()
        self.flush(_READ_WAIT_S)
        if not self.path.exists() and not (self.home / FOLDER).is_dir():
            with contextlib.closing(sqlite3.connect(":memory:")) as empty:
                database.create(empty)
                yield View(empty, self._unknown)
            return
        with contextlib.ExitStack() as stack:
            connection = self._reader(stack)
            stack.callback(connection.close)
            try:
                yield View(connection, self._unknown)
            except sqlite3.Error as error:
                raise LedgerError(
                    f"the ledger {self.path} cannot be read: {error}",
                    hint="run `trainonce report` again; a damaged ledger is then set aside",
                ) from error

    # ------------------------------------------------------------------ reading

    def _reader(self, stack: contextlib.ExitStack) -> sqlite3.Connection:
        try:
            connection = self._open(self._say)
            leftovers.take_over(connection, self.home, self._say, skip=self._writer.writer)
            connection.execute("PRAGMA query_only = ON")
            return connection
        except (sqlite3.Error, OSError) as error:
            reason = error
        # Nothing can be written there, or somebody holds it: read a private copy.
        try:
            folder = tempfile.TemporaryDirectory(prefix="trainonce-ledger-")
            scratch = Path(stack.enter_context(folder))
            connection = database.connect_copy(self.path, scratch)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(
                f"the ledger {self.path} cannot be read: {reason}; nor copied: {error}"
            ) from error
        leftovers.read_into(connection, self.home, self._say)
        return connection

    def _open(self, tell: Callable[[str], None]) -> sqlite3.Connection:
        try:
            return database.connect(self.path)
        except database.DamagedError:
            database.replace_damaged(self.path, tell)
            return database.connect(self.path)

    # ------------------------------------------------------------------ writing, on the thread

    def _start(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._work, name="trainonce-ledger", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._tell("thread", f"the ledger's thread does not start: {error}")
        else:
            self._thread = thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                batch = [self._pending[i] for i in range(min(_BATCH, len(self._pending)))]
                closing = self._closing
            if not batch:
                break
            try:
                with no_fork():
                    self._commit(batch)
            except (sqlite3.Error, OSError, LedgerError) as error:
                self._disconnect()
                self._report(error)
                with self._changed:
                    self._keep_pending()
                    if closing:
                        break
                    self._changed.wait_for(lambda: self._closing, _RETRY_S)
            else:
                self._drop_first(len(batch))
        self._disconnect()

    def _commit(self, batch: list[Entry]) -> None:
        try:
            database.write(self._connected(), self._writer, batch)
        except sqlite3.DatabaseError as error:
            if not database.is_damage(error):
                raise
            self._disconnect()
            database.replace_damaged(self.path, self._say)
            database.write(self._connected(), self._writer, batch)

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._identify() != self._file:
            self._disconnect()  # it was set aside, or removed, by somebody else
        if self._connection is None:
            self._connection = self._open(self._say)
            self._file = self._identify()
            leftovers.take_over(self._connection, self.home, self._say, skip=self._writer.writer)
        return self._connection

    def _identify(self) -> tuple[int, int]:
        try:
            stat = self.path.stat()
        except OSError:
            return (0, 0)
        return (stat.st_dev, stat.st_ino)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error), no_fork():
                self._connection.close()
            self._connection = None

    def _drop_first(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._pending.popleft()
            self._kept = max(0, self._kept - count)
            intake = self._intake
            if intake is not None and not self._pending and intake.size_bytes > _CLEAR_BYTES:
                # What cannot be emptied is only read again, and passed over.
                with contextlib.suppress(OSError):
                    intake.clear()
            if self._troubles:
                self._troubles.clear()
                self._say(f"the ledger {self.path} is being written again; nothing was lost")
            self._changed.notify_all()

    def _keep_pending(self) -> None:
        """Bring the side file up to date; the caller holds the lock."""
        if self._closed:
            return
        try:
            if self._intake is None:
                self._intake = Intake(self.home / FOLDER, self._writer)
            for index in range(self._kept, len(self._pending)):
                self._intake.write(self._pending[index])
                self._kept = index + 1
        except OSError:
            # The thread meets the same trouble at the database, and says so.
            return

    # ------------------------------------------------------------------ telling

    def _intake_path(self) -> Path:
        return self.home / FOLDER / f"{self._writer.writer}.jsonl"

    def _report(self, error: Exception) -> None:
        trouble = getattr(error, "sqlite_errorname", type(error).__name__)
        if trouble in self._troubles:
            return
        self._troubles.add(trouble)
        with self._changed:
            waiting, kept = len(self._pending), self._kept
        where = "in memory" if kept < waiting else f"in {self.home / FOLDER}"
        why = error.message if isinstance(error, LedgerError) else str(error)
        self._say(f"the ledger {self.path} cannot be written ({why}); events wait {where}")

    def _tell(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._say(text)

    def _say(self, text: str) -> None:
        try:
            self._on_error(text)
        except Exception:
            _log.exception("on_error failed; it was to say: %s", text)
