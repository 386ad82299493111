"""Who writes to the ledger, and whether that process still lives."""

from __future__ import annotations

import functools
import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Writer:
    """One process that appends events.

    Args:
        writer: Unique for ever, also across hosts.
        host: The host's name, for people.
        machine: Boot and process namespace: process ids compare only within one.
        pid: Its process id there.
        started: Start time of the process in clock ticks, so that a reused pid is seen.
    """

    writer: str
    host: str
    machine: str
    pid: int
    started: str


@functools.cache
def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode()}"


def _started(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, or "" where that cannot be read or is a zombie's."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def this_writer() -> Writer:
    """Return a new identity for this process."""
    pid = os.getpid()
    return Writer(
        writer=uuid.uuid4().hex,
        host=platform.node(),
        machine=_machine(),
        pid=pid,
        started=_started(pid),
    )


def is_alive(writer: Writer) -> bool | None:
    """Tell whether `writer`'s process lives; None where this host cannot know."""
    if writer.machine != _machine():
        return None
    if writer.started:
        return _started(writer.pid) == writer.started
    try:
        os.kill(writer.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
