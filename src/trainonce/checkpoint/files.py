"""Files that are whole or absent, whatever kills the writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from typing import TYPE_CHECKING

import xxhash

from trainonce.errors import CheckpointError, is_full

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_CHUNK_BYTES = 8 << 20


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is either absent, as before, or complete and on the disk."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def sync_and_digest(path: Path) -> tuple[int, str]:
    """Force `path` to the disk; return its size in bytes and the XXH3-64 of its content."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return digest(path)


def digest(path: Path) -> tuple[int, str]:
    """Return the size in bytes of `path` and the XXH3-64 of its content."""
    checksum = xxhash.xxh3_64()
    size = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum.update(chunk)
            size += len(chunk)
    return size, checksum.hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path, *, create: bool) -> int | None:
    """Lock the file `path` until the descriptor returned is closed.

    The kernel gives the lock back when its process dies, however that happens. A file that is
    created here is locked before it has its name, so that nobody finds it unlocked.

    Returns:
        A descriptor that the caller owns; None where somebody has the lock.

    Raises:
        FileNotFoundError: There is no such file, or no folder to create it in.
    """
    if create:
        with contextlib.suppress(FileExistsError):
            return _create_locked(path)
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its owner may have removed it since it was opened.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _create_locked(path: Path) -> int:
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.link(part, path)
    except OSError:
        os.close(descriptor)
        raise
    finally:
        part.unlink(missing_ok=True)
    return descriptor


@contextlib.contextmanager
def explained(doing: str, path: Path) -> Generator[None]:
    """Turn an error of the file system into a CheckpointError that says what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{doing} {path} failed: {error}",
            hint="make room there, keep fewer checkpoints, or save to another folder"
            if is_full(error)
            else "check that the folder exists, is writable, and is not used by another job",
        ) from error
