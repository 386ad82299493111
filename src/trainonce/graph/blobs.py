"""Blobs: bytes in files that are named by their own digest.

A blob is written to a temporary file, synced and renamed, so that under its name there are the
whole bytes or nothing. It is checked when this process first reads it; a damaged one is removed
and counts as missing, and whoever needs it writes it again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from trainonce.errors import StoreError, is_full
from trainonce.graph.digest import digest_bytes
from trainonce.graph.leases import is_dead, process_identity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_counter = itertools.count()


class Blobs:
    """The blobs in one folder.

    Args:
        root: The folder; `blobs/` and `tmp/` are made within.
        key: A tenant's 32-byte key: the same bytes then have another name for each tenant.
        read_only: Never write or remove a file.
    """

    def __init__(self, root: Path, *, key: bytes | None = None, read_only: bool = False) -> None:
        self._folder = root / "blobs"
        self._temporary = root / "tmp"
        self._key = key
        self._read_only = read_only
        self._checked: dict[str, tuple[int, int, int]] = {}
        self._lock = threading.Lock()
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._temporary.mkdir(exist_ok=True)

    def name_of(self, data: bytes | memoryview) -> str:
        """Return the name that `data` has here."""
        return digest_bytes(data, key=self._key)

    def put(self, data: bytes | memoryview) -> str:
        """Write `data` durably, unless it is there, and return its name.

        Raises:
            StoreError: The disk is full or the folder cannot be written. Nothing is left behind.
        """
        name = self.name_of(data)
        if self.get(name) is None:
            try:
                self._write(name, data)
            except OSError as error:
                raise StoreError(
                    f"a result of {len(data)} bytes cannot be stored: {error}",
                    hint="free some space, or give the store a smaller budget"
                    if is_full(error)
                    else None,
                ) from error
        return name

    def get(self, name: str, *, heal: bool = True) -> bytearray | None:
        """Return a fresh copy of a blob, or None where it is missing or damaged.

        Args:
            name: Of the blob.
            heal: Remove a damaged one, so that it can be written again.
        """
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                data = bytearray(stat.st_size)
                if _read_into(file.fileno(), memoryview(data)) != stat.st_size:
                    return None
        except OSError:
            return None
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if self._checked.get(name) != stamp:
            if self.name_of(memoryview(data)) != name:
                if heal:
                    self.remove(name)
                return None
            with self._lock:
                self._checked[name] = stamp
        return data

    def doubt(self, name: str) -> None:
        """Check a blob again at its next reading, whatever was found before."""
        with self._lock:
            self._checked.pop(name, None)

    def has(self, name: str) -> bool:
        """Tell whether there is a file of this name; its content is checked by `get`."""
        return self._path(name).exists()

    def size_of(self, name: str) -> int:
        """Return how many bytes a blob takes, 0 where it is missing."""
        try:
            return self._path(name).stat().st_size
        except OSError:
            return 0

    def remove(self, name: str) -> None:
        """Remove a blob. Whoever has read it keeps the bytes."""
        with self._lock:
            self._checked.pop(name, None)
        if not self._read_only:
            with contextlib.suppress(OSError):
                self._path(name).unlink()

    def names(self) -> Iterator[str]:
        """Yield the names of all blobs."""
        for shard in sorted(self._folder.glob("??")):
            for path in sorted(shard.iterdir()):
                yield shard.name + path.name

    def sweep(self) -> int:
        """Remove the temporary files of processes that are gone; return how many there were."""
        removed = 0
        for path in self._temporary.glob("*"):
            if is_dead(unquote(path.name.rpartition("~")[0])):
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed += 1
        return removed

    def _write(self, name: str, data: bytes | memoryview) -> None:
        owner = quote(process_identity(), safe="")
        temporary = self._temporary / f"{owner}~{threading.get_ident()}-{next(_counter)}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            path = self._path(name)
            path.parent.mkdir(exist_ok=True)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name[2:]


def sync_folder(folder: Path) -> None:
    """Make a rename within `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_into(descriptor: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = os.readv(descriptor, [view[done : done + (1 << 30)]])
        if count == 0:
            break
        done += count
    return done
