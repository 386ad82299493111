"""A store that many hosts share: an object store, or a folder on a network file system.

It needs one thing of the service, and that is put-if-absent. Entries are created, so the first
committed one stands. Claims are a chain of objects: token 1 is claimed by creating `1`, and
taken over by creating `2`, which only one taker can. The heartbeat is an object of the owner's
that it overwrites.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError, LeaseLostError, StoreError
from trainonce.graph.digest import digest_bytes
from trainonce.graph.leases import EXPIRY_S, is_dead, process_identity

if TYPE_CHECKING:
    from trainonce.clock import Clock


@dataclass(frozen=True)
class _Claim:
    owner: str
    home: str


def open_remote(url: str, **options: Any) -> Any:
    """Return an obstore store for a URL; `options` are obstore's (endpoint, region, keys).

    Raises:
        ConfigError: obstore is not installed, or does not know the URL.
    """
    try:
        stores = importlib.import_module("obstore.store")
    except ImportError as error:
        raise ConfigError(
            f"the store {url} needs obstore", hint="pip install 'trainonce[remote]'"
        ) from error
    try:
        if url.startswith("file://"):
            return stores.LocalStore.from_url(url, mkdir=True)
        return stores.from_url(url, **options)
    except Exception as error:
        raise ConfigError(f"the store {url} cannot be opened: {error}") from error


class Remote:
    """The shared half of a store.

    Args:
        store: An obstore store, as `open_remote` returns it.
        key: A tenant's 32-byte key: names and seals are bound to it.
        expiry_s: How long a heartbeat may stand still before a claim is taken over.
        clock: What waiters measure with.
    """

    def __init__(
        self,
        store: Any,
        *,
        key: bytes | None = None,
        expiry_s: float = EXPIRY_S,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._key = key
        self._expiry_s = expiry_s
        self._mono_s = clock.mono_s if clock else time.monotonic
        self._seen: dict[str, tuple[int, bytes, float]] = {}

    # -------------------------------------------------------- blobs and entries

    def get_blob(self, name: str) -> bytearray | None:
        """Fetch a blob; None where it is missing or its bytes do not fit its name."""
        data = self._get(f"blobs/{name[:2]}/{name}")
        return (
            data
            if data is not None and digest_bytes(memoryview(data), key=self._key) == name
            else None
        )

    def put_blob(self, name: str, data: bytes | memoryview) -> None:
        """Store a blob; one of the same name has the same bytes, or is damaged and heals."""
        self._put(f"blobs/{name[:2]}/{name}", bytes(data))

    def get_entry(self, key: str) -> dict[str, Any] | None:
        """Fetch the record of an action; None where it is missing, damaged or forged."""
        versions = self._list(f"entries/{key}/")
        for name in sorted(versions, reverse=True):
            data = self._get(name)
            seal, _, text = bytes(data or b"").partition(b"\n")
            if seal == digest_bytes(text, key=self._key).encode():
                return json.loads(text)
        return None

    def create_entry(self, key: str, record: dict[str, Any], version: int = 1) -> bool:
        """Commit a record unless this version exists; return whether it was this one."""
        text = json.dumps(record, sort_keys=True).encode()
        seal = digest_bytes(text, key=self._key).encode()
        return self._create(f"entries/{key}/{version:06d}", seal + b"\n" + text)

    def entry_versions(self, key: str) -> int:
        """Return how many versions of a record there are: more than one if it changed."""
        return len(self._list(f"entries/{key}/"))

    def remove(self, key: str, blob: str) -> None:
        """Erase an entry and its blob."""
        for name in self._list(f"entries/{key}/"):
            self._delete(name)
        if blob:
            self._delete(f"blobs/{blob[:2]}/{blob}")

    def bury(self, digest: str, what: str) -> None:
        """Leave a tombstone, for the fronts of other hosts."""
        self._put(f"tombstones/{digest}", what.encode())

    def buried(self) -> dict[str, str]:
        """Return all tombstones: digest -> what was forgotten."""
        names = self._list("tombstones/")
        return {name.rpartition("/")[2]: bytes(self._get(name) or b"").decode() for name in names}

    # -------------------------------------------------------- claims

    def claim(self, key: str, owner: str) -> RemoteLease | None:
        """Claim `key`, or return None while a living owner holds it."""
        token, beat = self._latest(key)
        if token and not self._has_expired(key, token, beat):
            return None
        me = json.dumps(asdict(_Claim(owner, process_identity()))).encode()
        if not self._create(_claim_name(key, token + 1), me):
            return None
        return RemoteLease(self, key, owner, token + 1)

    def is_claimed(self, key: str) -> bool:
        """Tell whether a living owner holds `key`."""
        token, beat = self._latest(key)
        return bool(token) and not self._has_expired(key, token, beat)

    def _latest(self, key: str) -> tuple[int, bytes]:
        """Return the newest token of a claim and what its heartbeat shows; (0, b"") if none."""
        names = [name.rpartition("/")[2] for name in self._list(f"claims/{key}/")]
        tokens = [int(name) for name in names if name.isdigit()]
        if not tokens:
            return 0, b""
        token = max(tokens)
        return token, bytes(self._get(f"{_claim_name(key, token)}.beat") or b"")

    def _has_expired(self, key: str, token: int, beat: bytes) -> bool:
        if beat == b"released":
            return True
        claim = self._get(_claim_name(key, token))
        with contextlib.suppress(ValueError, TypeError):
            if claim is not None and is_dead(_Claim(**json.loads(bytes(claim))).home):
                return True
        now_s = self._mono_s()
        seen = self._seen.get(key)
        if seen is None or seen[:2] != (token, beat):
            self._seen[key] = (token, beat, now_s)
            return False
        return now_s - seen[2] >= self._expiry_s

    # -------------------------------------------------------- the service

    def _get(self, name: str) -> bytearray | None:
        obstore = importlib.import_module("obstore")
        try:
            return bytearray(obstore.get(self._store, name).bytes())
        except FileNotFoundError:
            return None
        except Exception as error:
            raise StoreError(f"the shared store cannot be read: {error}") from error

    def _put(self, name: str, data: bytes) -> None:
        obstore = importlib.import_module("obstore")
        try:
            obstore.put(self._store, name, data)
        except Exception as error:
            raise StoreError(f"the shared store cannot be written: {error}") from error

    def _create(self, name: str, data: bytes) -> bool:
        obstore = importlib.import_module("obstore")
        exists = importlib.import_module("obstore.exceptions").AlreadyExistsError
        try:
            obstore.put(self._store, name, data, mode="create")
        except exists:
            return False
        except Exception as error:
            raise StoreError(f"the shared store cannot be written: {error}") from error
        return True

    def _list(self, prefix: str) -> list[str]:
        obstore = importlib.import_module("obstore")
        try:
            batches = obstore.list(self._store, prefix)
            return [str(item["path"]) for batch in batches for item in batch]
        except Exception as error:
            raise StoreError(f"the shared store cannot be read: {error}") from error

    def _delete(self, name: str) -> None:
        obstore = importlib.import_module("obstore")
        with contextlib.suppress(FileNotFoundError):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                raise
            except Exception as error:
                raise StoreError(f"the shared store cannot be written: {error}") from error


class RemoteLease:
    """A claim in the shared store. The counter only ever moves while its owner lives."""

    def __init__(self, remote: Remote, key: str, owner: str, token: int) -> None:
        self._remote = remote
        self.key, self.owner, self.token = key, owner, token
        self._beat = 0
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Show that the owner still works on it.

        Raises:
            LeaseLostError: Someone else has taken the claim over.
        """
        with self._lock:
            self.check()
            self._beat += 1
            self._remote._put(f"{_claim_name(self.key, self.token)}.beat", b"%d" % self._beat)

    def check(self) -> None:
        """Raise `LeaseLostError` if someone else has taken the claim over."""
        token, _ = self._remote._latest(self.key)
        if token != self.token:
            raise LeaseLostError(
                f"the shared claim of {self.owner} (token {self.token}) on {self.key[:16]} is "
                f"lost: token {token} holds it",
                hint="the owner stalled for longer than the expiry; its result is dropped",
            )

    def release(self) -> None:
        """End the claim; what was committed stays."""
        with self._lock:
            self._remote._put(f"{_claim_name(self.key, self.token)}.beat", b"released")


def _claim_name(key: str, token: int) -> str:
    return f"claims/{key}/{token:09d}"
