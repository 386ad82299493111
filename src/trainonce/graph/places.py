"""Where a store lies: a local folder, a network file system, or an object store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from trainonce import settings
from trainonce.graph.digest import digest_bytes

# On these, SQLite's WAL does not work: its shared memory is not shared between hosts.
_NETWORK_FILESYSTEMS = frozenset({
    "nfs", "nfs4", "lustre", "gpfs", "cifs", "smb", "smb2", "smb3", "smbfs", "beegfs", "ceph",
    "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs",
    "afs", "orangefs", "pvfs2", "panfs", "9p", "virtiofs", "wekafs", "davfs", "fuse.ceph",
})  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a store keeps its files.

    Args:
        local: The folder of blobs, index and claims of this host.
        shared: URL of the shared store behind it; empty where the folder is all there is.
        reason: Why it is laid out like this, for people.
    """

    local: Path
    shared: str = ""
    reason: str = "a local folder"


def place_of(location: str | Path | None = None) -> Place:
    """Return where the store of `location` keeps its files.

    Args:
        location: A folder or a URL (`s3://`, `gs://`, `az://`, `file://`, `memory://`);
            `TRAINONCE_STORE` if None, else `store` in the home folder of TrainOnce.
    """
    text = str(location or settings.STORE.get() or settings.home() / "store")
    scheme = urlsplit(text).scheme
    if len(scheme) > 1:
        return Place(_front_of(text), text, f"a local front for {scheme} storage")
    folder = Path(text).expanduser().absolute()
    kind = filesystem_of(folder)
    if kind in _NETWORK_FILESYSTEMS:
        reason = f"{folder} is on {kind}, where SQLite cannot share its log: claims are files"
        return Place(_front_of(str(folder)), folder.as_uri(), reason)
    return Place(folder)


def filesystem_of(folder: Path, mounts: str | None = None) -> str:
    """Return the type of the file system that holds `folder`; empty where it is not known.

    Args:
        folder: It need not exist yet.
        mounts: What /proc/mounts holds, if not the real one.
    """
    try:
        table = Path("/proc/mounts").read_text() if mounts is None else mounts
    except OSError:
        return ""
    best, kind = "", ""
    target = str(folder.resolve())
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        if (target + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def _front_of(location: str) -> Path:
    return settings.home() / "store-front" / digest_bytes(location.encode())[:16]
