"""The journal: what the index is made again from where its file is damaged.

Every committed entry and every tombstone is also a line of `entries.log`, sealed like a row of
the index. A line is appended by one write, which SIGKILL cannot tear; a line that is damaged
(by a power failure, say) is passed over. Collection writes the journal anew from the index.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trainonce.errors import StoreError
from trainonce.graph.digest import digest_bytes
from trainonce.graph.index import Entry, Index, index_path

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path

NAME = "entries.log"


@dataclass
class Replayed:
    """What a journal holds: entries by key, tombstones by digest, and unreadable lines."""

    entries: dict[str, Entry] = field(default_factory=lambda: {})
    tombstones: dict[str, tuple[str, float]] = field(default_factory=lambda: {})
    torn: int = 0


class Journal:
    """The journal of one store.

    Args:
        root: Folder of the store.
        key: A tenant's 32-byte key, which seals the lines.
    """

    def __init__(self, root: Path, *, key: bytes | None = None) -> None:
        self._path = root / NAME
        self._lock_path = root / f"{NAME}.lock"
        self._key = key

    def add(self, entry: Entry) -> None:
        """Note a committed entry. Trouble is no error: the index has it."""
        with contextlib.suppress(OSError):
            self._append([self._line({"entry": asdict(entry)})], durable=False)

    def bury(self, tombstones: Iterable[tuple[str, str, float]]) -> None:
        """Note tombstones, durably: what was forgotten must not come back.

        Raises:
            StoreError: They cannot be written.
        """
        lines = [self._line({"tombstone": [*one]}) for one in tombstones]
        try:
            self._append(lines, durable=True)
        except OSError as error:
            raise StoreError(f"tombstones cannot be written to {self._path}: {error}") from error

    def replay(self) -> Replayed:
        """Return what the intact lines say; later ones stand, and what is buried is left out."""
        found = Replayed()
        try:
            data = self._path.read_bytes()
        except OSError:
            return found
        for line in filter(None, data.split(b"\n")):
            seal, _, text = line.partition(b" ")
            if digest_bytes(text, key=self._key).encode() != seal:
                found.torn += 1
                continue
            self._take(found, json.loads(text))
        buried = found.tombstones
        found.entries = {
            key: entry
            for key, entry in found.entries.items()
            if key not in buried and not any(name in buried for _, name in entry.lineage)
        }
        return found

    def rewrite(self, index: Index) -> None:
        """Write the journal anew from an intact index, so that it does not grow for ever."""
        with self._locked(fcntl.LOCK_EX):
            # Read below the lock: an entry that is committed meanwhile is appended afterwards.
            # Read only: making a damaged index anew would want the lock as well.
            index = Index(index.db.path, key=self._key, read_only=True)
            rows = index.db.read("SELECT digest, what, wall_s FROM tombstones")
            records = [{"tombstone": list(row)} for row in rows]
            records += [{"entry": asdict(entry)} for entry in index.entries()]
            aside = self._path.with_suffix(".new")
            with aside.open("wb") as file:
                file.writelines(self._line(record) for record in records)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._path)
            index.db.close()

    def rebuild(self, damaged: Path) -> Path:
        """Make a new index from the journal, beside the damaged one; return its path.

        The damaged file stays where it is: a process that has it open may go on using it.
        Whatever another process has made meanwhile is taken.

        Raises:
            StoreError: It cannot be written.
        """
        try:
            with self._locked(fcntl.LOCK_EX):
                newest = index_path(self._path.parent)
                if newest.name != damaged.name:
                    return newest.resolve()
                target = index_path(self._path.parent, after=damaged)
                aside = target.with_suffix(".new")
                for leftover in aside.parent.glob(f"{aside.name}*"):
                    leftover.unlink()
                found = self.replay()
                index = Index(aside, key=self._key)
                index.refill(found.entries.values(), found.tombstones)
                index.db.close()
                aside.rename(target)
                return target.resolve()
        except OSError as error:
            raise StoreError(f"the index {damaged} is damaged, and no new one can be made: "
                             f"{error}") from error  # fmt: skip

    def _take(self, found: Replayed, record: dict[str, Any]) -> None:
        if "tombstone" in record:
            digest, what, wall_s = record["tombstone"]
            found.tombstones[digest] = (what, wall_s)
            return
        values = record["entry"]
        known = {one.name for one in fields(Entry)}
        values = {name: value for name, value in values.items() if name in known}
        values["lineage"] = [(kind, name) for kind, name in values["lineage"]]
        entry = Entry(**values)
        found.entries[entry.key] = entry

    def _line(self, record: dict[str, Any]) -> bytes:
        text = json.dumps(record, sort_keys=True).encode()
        # A newline first as well: what a torn write left behind spoils no other line.
        return b"\n" + digest_bytes(text, key=self._key).encode() + b" " + text + b"\n"

    def _append(self, lines: list[bytes], *, durable: bool) -> None:
        with self._locked(fcntl.LOCK_SH):
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.write(fd, b"".join(lines))
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Generator[None]:
        fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)
