"""The store: results of actions, shared by processes, and through a shared half by hosts.

`lookup` answers from the index alone; `load` reads the bytes and checks them. Whatever is
missing or damaged is a miss. A result is committed with the end of its claim in one
transaction, after its bytes are durable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError, DamagedError, EncodingError, StoreError
from trainonce.graph import codecs
from trainonce.graph.blobs import Blobs
from trainonce.graph.booking import book, saved
from trainonce.graph.digest import digest_bytes, digest_file, is_settled
from trainonce.graph.index import Entry, Index, index_path
from trainonce.graph.journal import Journal
from trainonce.graph.leases import EXPIRY_S, Lease, Leases, process_identity
from trainonce.graph.places import Place, place_of
from trainonce.graph.remote import Remote, RemoteLease, open_remote
from trainonce.graph.upkeep import evict

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator

    from trainonce.clock import Clock
    from trainonce.events import Event

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """The right to evaluate one action, here and in the shared half."""

    key: str
    local: Lease
    shared: RemoteLease | None = None

    def renew(self) -> None:
        """Show that the owner still works on it, everywhere."""
        self.local.renew()
        if self.shared is not None:
            self.shared.renew()


@dataclass(frozen=True)
class Loaded:
    """A value that was read from the store, and how long that took."""

    value: Any
    read_s: float


class Store:
    """Results by action key. Use `open_store`.

    Args:
        place: Where it lies.
        budget_bytes: Evict beyond this, the fewest seconds saved per byte first.
        tenant: A secret; digests and entries are bound to it, and no other tenant's are seen.
        read_only: Never write: misses are computed and not kept.
        remote: The shared half, if any.
        expiry_s: How long an owner may stall before its claim is taken over.
        clock: What waiters measure with.
        on_event: Is given `events.ComputeSaved` for the first use of each result; the ledger of
            `TRAINONCE_HOME` if None.

    Raises:
        StoreError: It is damaged, of a newer format, or cannot be made.
    """

    def __init__(
        self,
        place: Place,
        *,
        budget_bytes: int | None = None,
        tenant: str | bytes | None = None,
        read_only: bool = False,
        remote: Any = None,
        expiry_s: float = EXPIRY_S,
        clock: Clock | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.place = place
        self.budget_bytes = budget_bytes
        self.read_only = read_only
        self.on_event = on_event or book
        self.troubles: list[str] = []
        self.tenant_key = tenant_key(tenant) if tenant is not None else None
        self.root = place.local
        if self.tenant_key is not None:
            # The folder's name tells tenants apart and says nothing about their keys.
            self.root = place.local / "tenants" / self.bind("folder")[:32]
        _make_folder(self.root, read_only=read_only)
        self.blobs = Blobs(self.root, key=self.tenant_key, read_only=read_only)
        self.journal = Journal(self.root, key=self.tenant_key)
        self.index = self._open_index()
        self.leases = Leases(self.index.db, expiry_s=expiry_s, clock=clock)
        self.remote = (
            Remote(remote, key=self.tenant_key, expiry_s=expiry_s, clock=clock) if remote else None
        )
        self._saved: set[str] = set()
        self._fetch_tombstones()

    def trouble(self, text: str) -> None:
        """Note what went wrong without stopping anything, and say so the first time."""
        if text not in self.troubles:
            self.troubles.append(text)
            _log.warning("%s", text)

    def bind(self, digest: str) -> str:
        """Return a digest bound to the tenant; the same digest where there is none."""
        if self.tenant_key is None:
            return digest
        return digest_bytes(digest.encode(), key=self.tenant_key)

    # -------------------------------------------------------- reading

    def lookup(self, key: str) -> Entry | None:
        """Return what is known of an action, without reading its bytes."""
        entry = self.index.get(key)
        if entry is None and self.remote is not None:
            record = self._shared(lambda remote: remote.get_entry(key))
            entry = _entry_of(record, key) if record else None
            if entry is not None and not self.read_only and not self.is_forgotten(entry):
                with self.index.db.transaction() as connection:
                    self.index.write(connection, entry)
        return None if entry is None or self.is_forgotten(entry) else entry

    def load(self, entry: Entry) -> Loaded | None:
        """Return the result of an action, or None where its bytes are missing or damaged."""
        if not entry.blob:
            return None
        started = time.perf_counter()
        data = self.blobs.get(entry.blob)
        if data is None and self.remote is not None:
            data = self._shared(lambda remote: remote.get_blob(entry.blob))
            if data is not None and not self.read_only:
                with contextlib.suppress(StoreError):
                    self._keep_bytes(bytes(data))
        if data is None:
            return None
        try:
            value = codecs.decode(data)
        except EncodingError as error:
            self.trouble(f"{entry.node}: {error.message}")
            return None
        return Loaded(value, time.perf_counter() - started)

    def has_bytes(self, entry: Entry) -> bool:
        """Tell whether the bytes of an action seem to be in this half of the store."""
        return bool(entry.blob) and self.blobs.has(entry.blob)

    def note_use(self, entry: Entry, read_s: float, *, threads: int = 1, gpus: int = 0) -> None:
        """Count a use, and report what it saved if it is the first of this process.

        Args:
            entry: What was used.
            read_s: How long reading it took.
            threads: CPU threads that computing it occupied.
            gpus: GPUs that computing it occupied.
        """
        if not self.read_only:
            with contextlib.suppress(StoreError):
                self.index.touch(entry.key)
        if entry.key not in self._saved:
            self._saved.add(entry.key)
            cost = {"threads": threads, "gpus": gpus}
            self.on_event(
                saved(entry.node, entry.key, seconds=entry.seconds, read_s=read_s, **cost)
            )

    # -------------------------------------------------------- claims

    def claim(self, key: str, owner: str) -> Claim | None:
        """Claim an action, or return None while somebody else evaluates it."""
        local = self.leases.claim(key, owner)
        if local is None:
            return None
        if self.remote is None:
            return Claim(key, local)
        try:
            shared = self.remote.claim(key, owner)
        except StoreError as error:
            self.trouble(str(error))
            return Claim(key, local)
        if shared is None:
            local.release()
            return None
        return Claim(key, local, shared)

    def wait(self, key: str, timeout_s: float) -> bool:
        """Block until `key` can be claimed or `timeout_s` passed; return whether it can."""
        deadline = time.monotonic() + timeout_s
        if not self.leases.wait(key, timeout_s):
            return False
        while self.remote is not None:
            if not self._shared(lambda remote: remote.is_claimed(key)):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def release(self, claim: Claim) -> None:
        """Give up a claim without a result."""
        with contextlib.suppress(StoreError):
            claim.local.release()
        if claim.shared is not None:
            with contextlib.suppress(StoreError):
                claim.shared.release()

    # -------------------------------------------------------- writing

    def commit(
        self,
        entry: Entry,
        value: object,
        *,
        claim: Claim | None,
        replace: bool = False,
        whole: bool = False,
    ) -> Entry:
        """Keep a result and end its claim; return the entry that stands.

        That is another one than `entry` where an intact result was committed before: the first
        writer wins. Where its bytes are gone and the new ones differ, the new output is adopted
        and the entry marked nondeterministic.

        Args:
            entry: What is known, without its blob.
            value: The result.
            claim: The claim under which it was computed; None if it was computed without one.
            replace: Let the new result stand, whatever was there.
            whole: Keep nothing of a result without an encoding, not even its digest.

        Raises:
            LeaseLostError: The claim was taken over: nothing is kept.
            EncodingError: The result has no encoding; only its digest is kept.
            StoreError: The disk is full, or the store cannot be written.
        """
        if self.read_only:
            raise StoreError(f"the store {self.root} is open for reading only")
        if claim is not None and claim.shared is not None:
            claim.shared.check()
        try:
            data = codecs.encode(value)
        except EncodingError:
            if not whole:
                self._commit_entry(entry, claim, replace)
            raise
        entry = dataclasses.replace(entry, blob=self.blobs.name_of(data), size_bytes=len(data))
        with self._pinned(entry.blob):
            self._keep_bytes(data)
            stands = self._commit_entry(entry, claim, replace)
        self._share(stands, entry, data, claim)
        if self.budget_bytes is not None:
            evict(self, self.budget_bytes)
        return stands

    def note_uncached(self, node: str, reason: str) -> None:
        """Remember why a node was not cached, for `why`."""
        if not self.read_only:
            with self.index.db.transaction() as connection:
                connection.execute(
                    "INSERT OR REPLACE INTO uncached VALUES (?,?,?)", (node, reason, time.time())
                )

    def reason_uncached(self, node: str) -> str | None:
        """Return why a node was not cached the last time, or None."""
        rows = self.index.db.read("SELECT reason FROM uncached WHERE node=?", (node,))
        return rows[0][0] if rows else None

    def pin(self, key: str, holder: str = "user") -> None:
        """Keep the bytes of an action until they are unpinned.

        Raises:
            StoreError: There is no such entry.
        """
        entry = self.index.get(key)
        if entry is None or not entry.blob:
            raise StoreError(f"nothing is stored for {key[:16]}, so it cannot be pinned")
        with self.index.db.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO pins VALUES (?,?)", (entry.blob, holder))

    def unpin(self, key: str, holder: str = "user") -> None:
        """Let the bytes of an action be evicted again."""
        entry = self.index.get(key)
        if entry is not None:
            with self.index.db.transaction() as connection:
                connection.execute(
                    "DELETE FROM pins WHERE blob=? AND holder=?", (entry.blob, holder)
                )

    # -------------------------------------------------------- files and what is forgotten

    def file_digest(self, path: str | os.PathLike[str], *, strict: bool = False) -> str:
        """Return the digest of a file's content.

        An unchanged size, inode and time stamps spare reading it again, unless `strict` or the
        file changed so shortly before it was hashed that its stamps could not tell.
        """
        target = Path(path).absolute()
        stat = target.stat()
        stamp = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        if not strict:
            rows = self.index.db.read(
                "SELECT stat, digest, seal FROM files WHERE path=?", (str(target),)
            )
            if rows and rows[0][0] == stamp:
                if self.index.seal(f"{target}|{stamp}|{rows[0][1]}") == rows[0][2]:
                    return rows[0][1]
        content = digest_file(target)
        if not self.read_only and is_settled(stat):
            seal = self.index.seal(f"{target}|{stamp}|{content}")
            with self.index.db.transaction() as connection:
                connection.execute(
                    "INSERT OR REPLACE INTO files VALUES (?,?,?,?)",
                    (str(target), stamp, content, seal),
                )
        return content

    def is_forgotten(self, entry: Entry) -> bool:
        """Tell whether the result, or something it was made from, was forgotten on request."""
        names = [entry.key, *(name for _, name in entry.lineage)]
        marks = ",".join("?" * len(names))
        return bool(
            self.index.db.read(
                f"SELECT 1 FROM tombstones WHERE digest IN ({marks}) LIMIT 1", tuple(names)
            )
        )

    def close(self) -> None:
        """Close this thread's connection to the index."""
        self.index.db.close()

    # -------------------------------------------------------- within

    def _open_index(self) -> Index:
        """Open the index; one that is damaged is made again from the journal."""
        path = index_path(self.root)
        try:
            index = Index(path, key=self.tenant_key, read_only=self.read_only)
        except DamagedError as error:
            if self.read_only:
                raise
            self.trouble(f"{error.message}: made again from the journal")
            index = Index(self.journal.rebuild(path), key=self.tenant_key)
        if not self.read_only:
            index.db.repair = self._repair
        return index

    def _repair(self, damaged: Path) -> Path:
        self.trouble(f"the index {damaged} is damaged: made again from the journal")
        return self.journal.rebuild(damaged)

    def _commit_entry(self, entry: Entry, claim: Claim | None, replace: bool) -> Entry:
        stands = entry
        if self.is_forgotten(entry):
            raise StoreError(
                f"{entry.node} comes from a source that was forgotten, and is not kept",
                hint="`trainonce graph forget --list` shows what was forgotten",
            )

        def write(connection: Any) -> None:
            nonlocal stands
            before = self.index.get(entry.key)
            if before is not None and not replace and before.output != entry.output:
                if before.blob and self.blobs.get(before.blob) is not None:
                    stands = before
                    return
                stands = dataclasses.replace(entry, nondeterministic=True)
            elif before is not None:
                stands = dataclasses.replace(entry, nondeterministic=before.nondeterministic)
            self.index.write(connection, stands)
            if stands.blob:
                connection.execute(
                    "INSERT OR REPLACE INTO stored VALUES (?,?)", (stands.blob, stands.size_bytes)
                )

        if claim is not None:
            claim.local.commit(write)
        else:
            with self.index.db.transaction(durable=True) as connection:
                write(connection)
        if stands.output == entry.output:
            self.journal.add(stands)
        return stands

    def _keep_bytes(self, data: bytes) -> None:
        name = self.blobs.put(data)
        with self.index.db.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO stored VALUES (?,?)", (name, len(data)))

    @contextlib.contextmanager
    def _pinned(self, blob: str) -> Generator[None]:
        """Keep gc of other processes off a blob that no entry names yet."""
        row = (blob, process_identity())
        with self.index.db.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO pins VALUES (?,?)", row)
        try:
            yield
        finally:
            with contextlib.suppress(StoreError), self.index.db.transaction() as connection:
                connection.execute("DELETE FROM pins WHERE blob=? AND holder=?", row)

    def _share(self, stands: Entry, entry: Entry, data: bytes, claim: Claim | None) -> None:
        """Write through to the shared half; its trouble is noted, and loses nothing here."""
        if self.remote is None:
            return
        try:
            if stands.blob == entry.blob:
                self.remote.put_blob(entry.blob, data)
                record = dataclasses.asdict(stands)
                if not self.remote.create_entry(stands.key, record):
                    known = self.remote.get_entry(stands.key)
                    if known is None or known["output"] != stands.output:
                        version = self.remote.entry_versions(stands.key) + 1
                        self.remote.create_entry(stands.key, record, version)
            if claim is not None and claim.shared is not None:
                claim.shared.release()
        except StoreError as error:
            self.trouble(str(error))

    def _shared(self, ask: Callable[[Remote], Any]) -> Any:
        """Ask the shared half; None where there is none or it has trouble."""
        if self.remote is None:
            return None
        try:
            return ask(self.remote)
        except StoreError as error:
            self.trouble(str(error))
            return None

    def _fetch_tombstones(self) -> None:
        buried: dict[str, str] = self._shared(lambda remote: remote.buried()) or {}
        if buried and not self.read_only:
            rows = [(digest, what, time.time()) for digest, what in buried.items()]
            with self.index.db.transaction() as connection:
                connection.executemany("INSERT OR IGNORE INTO tombstones VALUES (?,?,?)", rows)


def open_store(
    location: str | Path | None = None,
    *,
    budget_bytes: int | None = None,
    tenant: str | bytes | None = None,
    read_only: bool = False,
    on_event: Callable[[Event], None] | None = None,
    expiry_s: float = EXPIRY_S,
    **remote_options: Any,
) -> Store:
    """Open a store, making it where it does not exist.

    Args:
        location: A folder, or the URL of an object store (`s3://bucket/prefix`, `gs://`,
            `az://`), which then stands behind a folder of this host. `TRAINONCE_STORE` if None.
            A folder on a network file system is noticed, and used like an object store.
        budget_bytes: Evict beyond this many bytes on this host.
        tenant: A secret that binds every digest and entry.
        read_only: Never write.
        on_event: Is given an `events.ComputeSaved` for the first use of each result; the ledger
            of `TRAINONCE_HOME` if None.
        expiry_s: How long an owner may stall before its claim is taken over, seconds.
        remote_options: Options of obstore: endpoint, region, keys.

    Raises:
        ConfigError: The location cannot be used.
        StoreError: It is damaged, or of a newer format.
    """
    place = place_of(location)
    remote = open_remote(place.shared, **remote_options) if place.shared else None
    if remote is None and remote_options:
        raise ConfigError(f"{sorted(remote_options)} are options of object stores")
    return Store(
        place,
        budget_bytes=budget_bytes,
        tenant=tenant,
        read_only=read_only,
        remote=remote,
        expiry_s=expiry_s,
        on_event=on_event,
    )


def tenant_key(secret: str | bytes) -> bytes:
    """Return the 32-byte key of a tenant's secret."""
    from blake3 import blake3

    data = secret.encode() if isinstance(secret, str) else secret
    return blake3(data, derive_key_context="trainonce 2026 tenant of a store").digest()


def _make_folder(root: Path, *, read_only: bool) -> None:
    if read_only:
        if not index_path(root).exists():
            hint = "it is made by the first write"
            if (root / "tenants").is_dir():
                hint = "what it holds belongs to tenants: give their secret"
            raise StoreError(f"there is no store in {root}", hint=hint)
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the store {root} cannot be made: {error}") from error


def _entry_of(record: dict[str, Any], key: str) -> Entry | None:
    known = {field.name for field in dataclasses.fields(Entry)}
    values = {name: value for name, value in record.items() if name in known}
    values["lineage"] = [(kind, name) for kind, name in values.get("lineage", [])]
    try:
        entry = Entry(**values)
    except TypeError:
        return None
    return entry if entry.key == key else None
