"""What belongs to one checkpoint, and whether all of it is there and unharmed.

`manifest.json` is written last. It names every other file with its size and XXH3-64, and
ends with the XXH3-64 of itself, so a checkpoint without a sound manifest is none.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from trainonce.checkpoint import files
from trainonce.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint, as its manifest describes it.

    Args:
        path: Its folder.
        step: Committed steps of the job that it holds.
        world_size: Number of ranks that it was written by.
        created_wall_s: When it was committed.
        files: File name to (size in bytes, XXH3-64 in hexadecimal).
        rounded: Tensors stored in fewer bits than they had, with the dtype they had: a
            resume from here is not bit for bit what it would have been.
        notes: Plain values of the caller's own.
    """

    path: Path
    step: int
    world_size: int
    created_wall_s: float
    files: dict[str, tuple[int, str]]
    rounded: dict[str, str] = field(default_factory=lambda: {})
    notes: dict[str, Any] = field(default_factory=lambda: {})

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(size for size, _checksum in self.files.values())

    def ranks_without_state(self, world_size: int) -> list[int]:
        """Return the ranks of a job of `world_size` that find no local state here."""
        return list(range(self.world_size, world_size))

    def damage(self, *, full: bool = True) -> str | None:
        """Return what is wrong with the files, or None where nothing is.

        Args:
            full: Read every byte. Otherwise only names and sizes are compared.
        """
        for name, (size, checksum) in sorted(self.files.items()):
            try:
                found = (self.path / name).stat().st_size
                if found != size:
                    return f"{name} has {found} bytes instead of {size}"
                if full and files.digest(self.path / name)[1] != checksum:
                    return f"{name} does not match its checksum"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None


def write(info: CheckpointInfo) -> None:
    """Write the manifest of `info` into its folder."""
    record = dataclasses.asdict(info)
    del record["path"]
    body = json.dumps({"format": FORMAT, **record}, sort_keys=True)
    text = f'{body}\n{{"xxh3_64":"{xxhash.xxh3_64_hexdigest(body.encode())}"}}'
    files.write_whole(info.path / NAME, text.encode())


def read(path: Path) -> CheckpointInfo:
    """Return the checkpoint in the folder `path`, by its manifest alone.

    Raises:
        CheckpointError: The manifest is absent, damaged or of another format; the message is
            the reason alone.
    """
    try:
        body, checksum = (path / NAME).read_text("ascii").splitlines()
        if json.loads(checksum)["xxh3_64"] != xxhash.xxh3_64_hexdigest(body.encode()):
            raise CheckpointError("the manifest does not match its checksum")
        record = json.loads(body)
        found = record.pop("format")
        if found != FORMAT:
            raise CheckpointError(f"format {found}, and this version reads format {FORMAT}")
        record["files"] = {name: tuple(entry) for name, entry in record["files"].items()}
        return CheckpointInfo(path=path, **record)
    except OSError as error:
        raise CheckpointError(f"the manifest cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError("the manifest is damaged") from error
