"""The side file in which an event waits until the database has it.

One file a writer, one JSON object a line. A line is in the page cache when `Intake.write`
returns, so it survives SIGKILL of the writer at any instant; the database takes it over a
moment later. What a dead writer left is taken over by whoever opens the ledger next. An
event is named by (writer, n), so taking it over twice does no harm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import LedgerError
from trainonce.ledger.identity import Writer, is_alive

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_FORMAT = 1
FOLDER = "ledger.intake"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One event on its way into the database.

    Args:
        n: Counts from 1 within its writer.
        job: The job it belongs to.
        kind: The event's kind.
        wall_s: The event's time.
        record: The event as JSON.
    """

    n: int
    job: str
    kind: str
    wall_s: float
    record: str


class Intake:
    """A writer's own side file. Locked while the writer lives.

    Args:
        folder: Where side files lie; made if needed.
        writer: Whose file this is.

    Raises:
        OSError: The file cannot be made.
    """

    def __init__(self, folder: Path, writer: Writer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{writer.writer}.jsonl"
        header = {"format": _FORMAT, "writer": dataclasses.asdict(writer)}
        self._header = json.dumps(header).encode() + b"\n"
        self._end = 0
        # It gets its name only when it is locked: nobody must take it for a dead writer's.
        unnamed = self.path.with_suffix(".new")
        self._fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):  # no locks here: importers ask for the pid
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._append(self._header)
            os.rename(unnamed, self.path)
        except OSError:
            os.close(self._fd)
            with contextlib.suppress(OSError):
                unnamed.unlink()
            raise

    @property
    def size_bytes(self) -> int:
        """Bytes of whole lines."""
        return self._end

    def write(self, entry: Entry) -> None:
        """Add one line.

        Raises:
            OSError: There is no room, or the disk fails; the file holds whole lines still.
        """
        if self._end == 0:
            self._append(self._header)
        line = f'{{"n":{entry.n},"job":{json.dumps(entry.job)},"event":{entry.record}}}\n'
        self._append(line.encode())

    def clear(self) -> None:
        """Drop all lines, once the database has them."""
        os.ftruncate(self._fd, 0)
        self._end = 0

    def close(self, *, keep: bool) -> None:
        """Unlock the file; remove it unless `keep`."""
        if not keep:
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._fd)

    def _append(self, data: bytes) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], self._end + done)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)  # no torn line; the next one goes here anyway
            raise
        self._end += done


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """What a side file holds.

    Args:
        writer: Who wrote it; None where not even its first line is whole.
        entries: Its whole lines.
        torn: How many lines could not be read.
    """

    writer: Writer | None
    entries: list[Entry]
    torn: int


def side_files(folder: Path) -> list[Path]:
    """Return the side files in `folder`, oldest name first."""
    return sorted(folder.glob("*.jsonl"))


@contextlib.contextmanager
def claim(path: Path) -> Generator[Leftover | None]:
    """Hold a dead writer's side file; None where its writer lives or another one claims it.

    Raises:
        LedgerError: A newer version wrote it.
        OSError: It cannot be read.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            yield None
            return
        except OSError:  # this file system has no locks
            locked = False
        found = read_side_file(path)
        dead = locked or (found.writer is not None and is_alive(found.writer) is False)
        yield found if dead else None
    finally:
        os.close(fd)


def read_side_file(path: Path) -> Leftover:
    """Return what `path` holds.

    Raises:
        LedgerError: A newer version wrote it.
        OSError: It cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    header = _parse(lines[0])
    if header is None:
        return Leftover(writer=None, entries=[], torn=int(len(lines) > 1 or bool(lines[0])))
    if header.get("format") != _FORMAT:
        raise LedgerError(
            f"{path} has format {header.get('format')}, this version reads {_FORMAT}",
            hint="upgrade trainonce to read it; it was left as it is",
        )
    writer = Writer(**header["writer"])
    entries: list[Entry] = []
    torn = 0
    for raw in filter(None, lines[1:]):
        line = _parse(raw)
        if line is None:
            torn += 1
            continue
        event = line["event"]
        entries.append(
            Entry(
                n=line["n"],
                job=line["job"],
                kind=event["kind"],
                wall_s=event["wall_s"],
                record=json.dumps(event, separators=(",", ":")),
            )
        )
    return Leftover(writer=writer, entries=entries, torn=torn)


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
