"""Claims, so that of many processes that want the same result one computes it.

A claim has an owner, a heartbeat counter and a fencing token. It expires when its counter
stands still for `expiry_s` on the *waiter's* monotonic clock, so no two clocks are ever
compared; an owner that is known to be dead (its process is gone from this host) expires at
once. Taking a claim over raises the token, and everything the former owner does with it
afterwards is refused.

What holds: committed once, always; evaluated once, unless an owner dies or stalls.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainonce.clock import Clock, SystemClock
from trainonce.errors import LeaseLostError, StoreError
from trainonce.graph.db import Database

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Generator

SCHEMA = """
CREATE TABLE IF NOT EXISTS claims(
    key TEXT PRIMARY KEY, token INTEGER NOT NULL, owner TEXT NOT NULL,
    home TEXT NOT NULL, beat INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fence(id INTEGER PRIMARY KEY CHECK (id = 1), token INTEGER NOT NULL);
INSERT OR IGNORE INTO fence VALUES (1, 0);
"""

HEARTBEAT_S = 2.0
EXPIRY_S = 20.0

# The claims that this process holds: path of the file, and token.
_mine: set[tuple[str, int]] = set()


@dataclass(frozen=True)
class Holder:
    """Who holds a claim: `token` and `beat` change with every take-over and heartbeat."""

    token: int
    owner: str
    home: str
    beat: int


class Renewable(Protocol):
    """Anything with a heartbeat: a lease here, one in the shared half, or both together."""

    def renew(self) -> None:
        """Show that the owner still works on it; raise `LeaseLostError` if it is lost."""
        ...


class Leases:
    """The claims in one SQLite file, shared by all processes of a host.

    Args:
        path: The file, made if missing; on a local file system.
        expiry_s: How long a counter may stand still before a waiter takes the claim over.
        clock: What waiters measure with.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Database,
        *,
        expiry_s: float = EXPIRY_S,
        clock: Clock | None = None,
    ) -> None:
        self._db = path if isinstance(path, Database) else Database(Path(path), SCHEMA)
        self._clock = clock or SystemClock()
        self._expiry_s = expiry_s
        self._seen: dict[str, tuple[int, int, float]] = {}
        self._lock = threading.Lock()

    def claim(self, key: str, owner: str) -> Lease | None:
        """Claim `key`, or return None while a living owner holds it.

        A claim whose owner is dead, or whose counter this object has watched stand still for
        `expiry_s`, is taken over.

        Args:
            key: What is claimed: an action key, or the name of a chunk of rows.
            owner: Says to people who it is; a second claim by the same owner is refused too.
        """
        holder = self.holder(key)
        if holder is not None and not self._has_expired(key, holder):
            return None
        with self._db.transaction() as connection:
            now = _holder(connection, key)
            if now is not None and (holder is None or _stamp(now) != _stamp(holder)):
                return None
            token = _next_token(connection)
            connection.execute(
                "INSERT OR REPLACE INTO claims VALUES (?,?,?,?,0)",
                (key, token, owner, process_identity()),
            )
            lease = Lease(self._db, key, owner, token)
            _mine.add(lease.identity)  # before other threads can see the row
        return lease

    def holder(self, key: str) -> Holder | None:
        """Return who holds `key`, or None."""
        rows = self._db.read("SELECT token, owner, home, beat FROM claims WHERE key=?", (key,))
        return Holder(*rows[0]) if rows else None

    def wait(self, key: str, timeout_s: float) -> bool:
        """Block until `key` can be claimed; return False if that took longer than `timeout_s`.

        That it could be claimed does not mean that it is still to be computed: look for the
        result first.
        """
        deadline = self._clock.mono_s() + timeout_s
        pause_s = 0.002
        while True:
            holder = self.holder(key)
            if holder is None or self._has_expired(key, holder):
                return True
            left_s = deadline - self._clock.mono_s()
            if left_s <= 0:
                return False
            self._clock.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, 0.1)

    @contextlib.contextmanager
    def keep(self, lease: Renewable, every_s: float | None = None) -> Generator[None]:
        """Renew `lease` from a thread of its own while the block runs.

        Every `HEARTBEAT_S`, or a tenth of the expiry where that is less.
        """
        if every_s is None:
            every_s = min(HEARTBEAT_S, self._expiry_s / 10)
        stop = threading.Event()
        thread = threading.Thread(
            target=_beat_until, args=(stop, lease, every_s), daemon=True, name="lease-heartbeat"
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _has_expired(self, key: str, holder: Holder) -> bool:
        if is_dead(holder.home):
            return True
        ours = holder.home == process_identity()
        if ours and (str(self._db.path), holder.token) not in _mine:
            # But this process does not hold it: the file was put back to an older state.
            return True
        now_s = self._clock.mono_s()
        with self._lock:
            seen = self._seen.get(key)
            if seen is None or seen[:2] != _stamp(holder):
                self._seen[key] = (*_stamp(holder), now_s)
                return False
            return now_s - seen[2] >= self._expiry_s


@dataclass(frozen=True)
class Lease:
    """A claim that this process holds until it commits, releases, or is fenced.

    `token` grows with every claim ever made in the store, so a later owner has a larger one.
    """

    _db: Database
    key: str
    owner: str
    token: int

    @property
    def identity(self) -> tuple[str, int]:
        """What tells this claim from every other that this process holds."""
        return str(self._db.path), self.token

    def renew(self) -> None:
        """Show that the owner still works on it.

        Raises:
            LeaseLostError: Someone else has taken the claim over.
        """
        with self._db.transaction() as connection:
            self._check(connection)
            connection.execute("UPDATE claims SET beat=beat+1 WHERE key=?", (self.key,))

    def commit(self, write: Callable[[sqlite3.Connection], None] | None = None) -> None:
        """End the claim with a result, in one durable transaction.

        Args:
            write: Writes the result into other tables of the same file; whatever it raises
                leaves file and claim as they were.

        Raises:
            LeaseLostError: Someone else has taken the claim over: nothing is written.
        """
        with self._db.transaction(durable=True) as connection:
            self._check(connection)
            if write is not None:
                write(connection)
            connection.execute("DELETE FROM claims WHERE key=?", (self.key,))
        _mine.discard(self.identity)

    def release(self) -> None:
        """End the claim without a result. A lost claim is left to who holds it now."""
        with self._db.transaction() as connection:
            connection.execute("DELETE FROM claims WHERE key=? AND token=?", (self.key, self.token))

    def _check(self, connection: sqlite3.Connection) -> None:
        holder = _holder(connection, self.key)
        if holder is None or holder.token != self.token:
            now = f"{holder.owner} (token {holder.token})" if holder else "nobody"
            raise LeaseLostError(
                f"the claim of {self.owner} (token {self.token}) on {self.key[:16]} is lost: "
                f"{now} holds it",
                hint="the owner stalled for longer than the expiry; its result is dropped",
            )


def _beat_until(stop: threading.Event, lease: Renewable, every_s: float) -> None:
    while not stop.wait(every_s):
        try:
            lease.renew()
        except LeaseLostError:
            return  # the commit will be refused, and says so
        except StoreError:
            continue  # a busy or full disk may recover before the claim expires


def _holder(connection: sqlite3.Connection, key: str) -> Holder | None:
    row = connection.execute(
        "SELECT token, owner, home, beat FROM claims WHERE key=?", (key,)
    ).fetchone()
    return Holder(*row) if row else None


def _stamp(holder: Holder) -> tuple[int, int]:
    return holder.token, holder.beat


def _next_token(connection: sqlite3.Connection) -> int:
    connection.execute("UPDATE fence SET token=token+1")
    return connection.execute("SELECT token FROM fence").fetchone()[0]


# ---------------------------------------------------------------- is an owner dead?


def process_identity() -> str:
    """Return what tells this process from every other, on any host, at any time."""
    pid = os.getpid()
    return f"{host_identity()}|{pid}|{_started(pid) or ''}"


def is_dead(home: str) -> bool:
    """Tell whether the process with this identity is certainly gone. False where unknown."""
    host, _, rest = home.partition("|")
    pid, _, started = rest.partition("|")
    if host != host_identity() or not pid.isdigit():
        return False
    now = _started(int(pid))
    return now is not None and now != started


@functools.cache
def host_identity() -> str:
    """Return a name for this boot of this host and this process namespace."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()},{boot},{namespace}"


def _started(pid: int) -> str | None:
    """Return when a process started, "" where it is gone, or None where it cannot be told.

    In ticks since the boot: a wall clock that jumps changes nothing.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else fields[18]
    except (OSError, ValueError, IndexError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            return None
        return None
