"""The tables of a row store as files: what there is, whose it is, and what it was made from.

For upkeep and the command line; nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trainonce.graph.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

ABOUT = "about.json"
COST = "cost.json"
LINEAGE = "lineage"
FORGOTTEN = "forgotten"
SUFFIX = ".rows"
DIGEST_BYTES = 16
_HEAD = struct.Struct("<8sQQ16s")
_PAIR = np.dtype([("child", f"S{DIGEST_BYTES}"), ("parent", f"S{DIGEST_BYTES}")])


@dataclass
class Table:
    """The rows of one subgraph, or a table of digests and labels beside them.

    Args:
        folder: Where its segments are.
        subgraph: The digest of the subgraph; empty where no segment can be read.
        segments: Names of its files, oldest first.
        num_rows: As the segments say.
        size_bytes: Bytes on disk.
        name: What computed it: "features(ResNet)"; empty for tables beside the rows.
        parts: What its digest was made of.
        seconds_per_row: What computing a row took; 0.0 where it is not known.
        last_used_s: Seconds since the epoch.
    """

    folder: Path
    subgraph: str = ""
    segments: list[str] = field(default_factory=lambda: [])
    num_rows: int = 0
    size_bytes: int = 0
    name: str = ""
    parts: dict[str, str] = field(default_factory=lambda: {})
    seconds_per_row: float = 0.0
    last_used_s: float = 0.0


def tables(folder: Path) -> list[Table]:
    """Return all tables below the folder of a row store, the most recently used first."""
    try:
        entries = [entry for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    found = [_table(folder / entry.name) for entry in entries]
    return sorted((t for t in found if t.segments), key=lambda t: -t.last_used_s)


def size_of(path: Path) -> int:
    """Return the bytes that a file takes on disk: holes take none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def seconds_per_row(folder: Path) -> float:
    """Return what a row of this table took to compute, or 0.0 where it is not known."""
    cost = _json(folder / COST)
    try:
        return float(cost["seconds"]) / max(1, int(cost["rows"]))
    except (ValueError, KeyError, TypeError):
        return 0.0


def note(folder: Path, name: str, parts: Iterable[tuple[str, str]]) -> bytes:
    """Return what `ABOUT` of a table holds."""
    return json.dumps({"name": name, "parts": dict(parts)}).encode()


# ---------------------------------------------------------------- lineage and forgetting


def lineage_file(children: NDArray[np.bytes_], parents: NDArray[np.bytes_]) -> tuple[str, bytes]:
    """Return name and content of a file that tells which digests were made from which."""
    pairs = np.empty(len(children), _PAIR)
    pairs["child"], pairs["parent"] = children, parents
    data = np.unique(pairs).tobytes()
    return _lineage_name(data), data


def damaged_lineage(folder: Path) -> list[str]:
    """Return the names of lineage files that do not hold what they were written with."""
    return [path.name for path, data in _lineage(folder) if _lineage_name(data) != path.name]


def settle_lineage(folder: Path, name: str) -> None:
    """Keep what a damaged lineage file still says: its other pairs are whole."""
    path = folder / LINEAGE / name
    data = path.read_bytes()
    path.rename(path.with_name(_lineage_name(data)))


def descendants(folder: Path, digests: set[bytes]) -> set[bytes]:
    """Return these digests and all that were made from them, through every chain."""
    reached = {name.ljust(DIGEST_BYTES, b"\0") for name in digests}
    pairs = list(_pairs(folder))
    fresh = reached
    while fresh:
        wanted = np.array(sorted(fresh), f"S{DIGEST_BYTES}")
        made = {
            bytes(child).ljust(DIGEST_BYTES, b"\0")
            for part in pairs
            for child in part["child"][np.isin(part["parent"], wanted)].tolist()
        }
        fresh = made - reached
        reached |= fresh
    return reached


def forgotten(folder: Path) -> NDArray[np.bytes_]:
    """Return the digests of samples that were forgotten on request: "S16"."""
    try:
        data = (folder / FORGOTTEN).read_bytes()
    except OSError:
        data = b""
    return np.frombuffer(data[: len(data) // DIGEST_BYTES * DIGEST_BYTES], f"S{DIGEST_BYTES}")


def bury(folder: Path, digests: Iterable[bytes]) -> None:
    """Note digests as forgotten, durably; each twice, so that no single flaw loses one."""
    data = 2 * b"".join(sorted(name.ljust(DIGEST_BYTES, b"\0") for name in digests))
    if not data:
        return
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / FORGOTTEN, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _lineage_name(data: bytes) -> str:
    return f"{digest_bytes(data)[:32]}.pairs"


def _lineage(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted((folder / LINEAGE).glob("*.pairs")):
        yield path, path.read_bytes()


def _pairs(folder: Path) -> Iterator[NDArray[Any]]:
    for _, data in _lineage(folder):
        yield np.frombuffer(data[: len(data) // _PAIR.itemsize * _PAIR.itemsize], _PAIR)


def _table(folder: Path) -> Table:
    found = Table(folder, segments=sorted(n for n in os.listdir(folder) if n.endswith(SUFFIX)))
    for name in found.segments:
        found.size_bytes += size_of(folder / name)
        head = _head(folder / name)
        if head is not None:
            found.subgraph, num_rows = head
            found.num_rows += num_rows
    about = _json(folder / ABOUT)
    found.name = str(about.get("name", ""))
    parts = about.get("parts")
    if isinstance(parts, dict):
        found.parts = {str(name): str(value) for name, value in parts.items()}
    found.seconds_per_row = seconds_per_row(folder)
    try:
        found.last_used_s = (folder / ABOUT).stat().st_mtime
    except OSError:
        found.last_used_s = folder.stat().st_mtime
    return found


def _head(path: Path) -> tuple[str, int] | None:
    """Return a segment's subgraph and rows, unchecked; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            _, length, size, _ = _HEAD.unpack(file.read(_HEAD.size))
            head = json.loads(file.read(length)) if length <= size else {}
        return str(head["subgraph"]), int(head["rows"])
    except (OSError, OverflowError, ValueError, KeyError, TypeError, struct.error):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
