"""Whether a folder lies on a network file system, where SQLite's WAL does not work.

WAL keeps its index in memory that all processes map; over NFS and its like hosts do not see
each other's maps (sqlite.org/wal.html, "all processes must be on the same host computer").
"""

from __future__ import annotations

import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")

# File system types, as the kernel names them, that more than one host may have mounted.
_NETWORK = frozenset(
    ("nfs", "nfs3", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "lustre", "gpfs", "beegfs",
     "beegfs_nodev", "ceph", "glusterfs", "afs", "9p", "virtiofs", "orangefs", "pvfs2", "wekafs",
     "panfs", "ocfs2", "gfs2", "coda", "ncpfs", "vboxsf")
)  # fmt: skip


def network_filesystem(path: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the network file system that holds `path`, or "" if it is local.

    FUSE mounts (sshfs, s3fs, JuiceFS, ...) count as network: what is behind them is unknown.

    Args:
        path: A folder; where it does not exist yet, its nearest existing parent counts.
        mounts: A table in the format of /proc/self/mountinfo. Where there is none (macOS),
            everything counts as local.
    """
    try:
        table = mounts.read_text()
    except OSError:
        return ""
    place = os.path.realpath(path)
    best, kind = "", ""
    for line in table.splitlines():
        left, dash, right = line.partition(" - ")
        fields, types = left.split(), right.split()
        if not dash or len(fields) < 5 or not types:
            continue
        point = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point the later covers the earlier.
        if inside and len(point) >= len(best):
            best, kind = point, types[0]
    return kind if kind in _NETWORK or kind.startswith("fuse") else ""
