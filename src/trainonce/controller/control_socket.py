"""How `trainonce ps`, `migrate` and `drain` reach a running launcher.

An abstract Unix socket: it vanishes with the launcher, whatever kills it. Both sides check
that the other belongs to the same user. Requests and answers are one line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.controller.drain import Drain
from trainonce.errors import ConfigError, JobNotFoundError, WireError
from trainonce.wire.progress import Phase

if TYPE_CHECKING:
    from trainonce.controller.supervisor import Supervisor

_MAX_LINE_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_ANSWER_TIMEOUT_S = 1.0


def _address(job: str) -> str:
    return f"\0trainonce-{os.getuid()}-{job}"


def _is_same_user(sock: socket.socket) -> bool:
    size = struct.calcsize("3i")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _pid, uid, _gid = struct.unpack("3i", raw)
    return uid == os.getuid()


def _read_line(sock: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        piece = sock.recv(_READ_BYTES)
        if not piece or len(data) > _MAX_LINE_BYTES:
            raise WireError("the launcher left in the middle of a line")
        data += piece
    return _decode(data)


def _decode(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise WireError(f"not a line of JSON: {data[:100]!r}") from error
    if not isinstance(record, dict):
        raise WireError(f"not a JSON object: {data[:100]!r}")
    return record


class ControlServer:
    """The launcher's end.

    Args:
        job: Id of the job.

    Raises:
        ConfigError: A job of this id is running already.
    """

    def __init__(self, job: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        try:
            self._sock.bind(_address(job))
        except OSError as error:
            self._sock.close()
            raise ConfigError(
                f"job {job} is running already", hint="choose another --job-id, or wait for it"
            ) from error
        self._sock.listen(16)
        self._sock.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._sock.fileno()

    def close(self) -> None:
        """Stop answering."""
        self._sock.close()

    def accept(self) -> Client | None:
        """Take a connection that is waiting; None if it is gone or of another user."""
        try:
            sock, _address = self._sock.accept()
        except OSError:
            return None
        sock.setblocking(False)
        if not _is_same_user(sock):
            sock.close()
            return None
        return Client(sock)


class Client:
    """One connection to the launcher: a request, then an answer.

    Args:
        sock: The connection; owned, and closed with the answer.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""

    def read(self) -> dict[str, Any] | None:
        """Read what is there; None until the request is complete.

        Raises:
            WireError: It is no request.
        """
        try:
            piece = self.sock.recv(_READ_BYTES)
        except OSError as error:
            raise WireError(f"the client is gone: {error}") from error
        self._data += piece
        if self._data.endswith(b"\n"):
            return _decode(self._data)
        if not piece or len(self._data) > _MAX_LINE_BYTES:
            raise WireError("the client left in the middle of a line")
        return None

    def answer(self, ok: bool, **values: Any) -> None:
        """Send the answer and hang up."""
        with self.sock, contextlib.suppress(OSError):
            self.sock.setblocking(True)
            self.sock.settimeout(_ANSWER_TIMEOUT_S)
            self.sock.sendall(json.dumps({"ok": ok, **values}).encode() + b"\n")


def serve(supervisor: Supervisor, client: Client, request: dict[str, Any]) -> None:
    """Answer `request` now, or once it is done."""
    rank = request.get("rank")
    if request.get("op") == "status":
        client.answer(True, **status(supervisor))
    elif request.get("op") == "migrate" and isinstance(rank, int):
        supervisor.migration.request(rank, lambda ok, text: client.answer(ok, text=text))
    elif request.get("op") == "drain" and isinstance(request.get("host"), str):
        drain = Drain(
            supervisor,
            request["host"],
            str(request.get("device", "")),
            checkpoint=request.get("checkpoint") is True,
        )
        act = drain.undo if request.get("undo") is True else drain.run
        act(lambda ok, text: client.answer(ok, text=text))
    else:
        client.answer(False, text=f"unknown request {request.get('op')!r}")


def status(supervisor: Supervisor) -> dict[str, Any]:
    """Return what `trainonce ps` shows of a job."""
    job = supervisor.job
    guests = job.guests()
    workers: list[dict[str, Any]] = []
    # One whose death was noticed keeps its rank until it is reaped, and has a successor by then.
    alive = [handle for handle in job.workers.values() if handle.lives]
    for handle in sorted(alive, key=lambda h: (h.rank < 0, h.dismissed, h.rank, h.worker)):
        page = handle.process.progress.snapshot()
        phase = Phase(page["phase"]).name.lower() if page["phase"] in list(Phase) else "unknown"
        workers.append(
            {
                "rank": handle.rank if handle.rank >= 0 else None,
                "worker": handle.worker,
                "pid": handle.pid,
                "phase": phase,
                "step": page["commits"],
                "slot": handle.slot,
                "guest_of": guests.get(handle.rank),
                "parked": handle.parked if handle.rank < 0 else "",
                "leaving": handle.dismissed,
            }
        )
    return {
        "job": job.id,
        "pid": os.getpid(),
        "script": job.options.script,
        "world_size": job.options.nproc,
        "generation": job.membership.generation,
        "incarnation": job.membership.incarnation,
        "step": job.step,
        "incidents": job.incidents.total,
        "lost_ranks": sorted(job.membership.lost),
        "short": job.short,
        "lost_slots": [s.slot for s in job.slot_statuses() if not s.usable],
        "logs": str(job.logs.folder),
        "workers": workers,
    }


def request(job: str, *, timeout_s: float | None = None, **values: Any) -> dict[str, Any]:
    """Ask the launcher of `job`, and return its answer.

    Raises:
        JobNotFoundError: No such job of this user is running.
        WireError: It left before it answered.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(_address(job))
        except OSError as error:
            raise JobNotFoundError(
                f"no job {job!r} is running", hint="`trainonce ps` lists running jobs"
            ) from error
        if not _is_same_user(sock):
            raise JobNotFoundError(f"job {job!r} belongs to another user")
        try:
            sock.sendall(json.dumps(values).encode() + b"\n")
            return _read_line(sock)
        except OSError as error:
            raise WireError(f"job {job} ended before it answered") from error


def running_jobs() -> list[str]:
    """Return the ids of this user's running jobs on this host, sorted."""
    prefix = f"@trainonce-{os.getuid()}-"
    found: set[str] = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        # Listening sockets only: an accepted connection carries the same name.
        if len(fields) == 8 and fields[7].startswith(prefix) and int(fields[3], 16) & 0x10000:
            found.add(fields[7].removeprefix(prefix))
    return sorted(found)
