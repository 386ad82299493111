"""Which process computes which missing rows.

Rows are claimed a chunk at a time. To choose one, a process holds the subgraph's lock for a
moment, leaves out the rows that living claims name, and claims some of the rest; so sets that
overlap in any way are still computed once. The claim itself is a lease: it ends when its owner
commits or dies, and its rows are free again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainonce.errors import StoreError
from trainonce.graph.features.fingerprint import write_aside
from trainonce.graph.features.segments import DIGEST_BYTES
from trainonce.graph.leases import Leases, process_identity

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from numpy.typing import NDArray

    from trainonce.graph.features.rows import RowTable
    from trainonce.graph.leases import Lease

_log = logging.getLogger(__name__)
_SUFFIX = ".claim"


@dataclass(frozen=True)
class Chunk:
    """Rows that this process is to compute: sample digests, and the claim on them."""

    digests: NDArray[np.bytes_]
    lease: Lease | None = None


class Claims:
    """Claims on the rows of one table.

    Args:
        table: Whose rows.
        folder: Of the row store; its claims are in one file there.
        shared: Claim at all. A table that cannot be written is nobody else's business.
    """

    def __init__(self, table: RowTable, folder: Path, *, shared: bool = True) -> None:
        self._table = table
        self._folder = table.folder / "claims"
        self._leases: Leases | None = None
        self._blocking: str | None = None
        if not shared:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._leases = Leases(folder / "claims.sqlite")
            self._leases.holder("")
        except (OSError, StoreError) as error:
            _log.warning("rows are computed without claims (%s)", error)
            self._leases = None

    def choose(self, missing: NDArray[np.bytes_], max_rows: int) -> Chunk | None:
        """Claim up to `max_rows` of the missing rows; None where others are at all of them.

        Args:
            missing: Distinct sample digests without a row, in the order to compute them.
            max_rows: Of one chunk.

        Returns:
            A chunk, which is empty where all rows have arrived meanwhile.
        """
        if self._leases is None:
            return Chunk(missing[:max_rows])
        try:
            with self._table.lock():
                self._table.refresh()
                missing = missing[self._table.locate(missing) < 0]
                free = missing[~np.isin(missing, self._in_flight(self._leases))]
                if not len(free):
                    return None if len(missing) else Chunk(missing)
                return self._claim(self._leases, free[:max_rows])
        except (OSError, StoreError) as error:
            _log.warning("rows are computed without claims (%s)", error)
            self._leases = None
            return Chunk(missing[:max_rows])

    def wait(self, timeout_s: float = 1.0) -> None:
        """Wait until a claim that was in the way may have ended."""
        if self._leases is not None and self._blocking is not None:
            self._leases.wait(self._blocking, timeout_s)

    @contextlib.contextmanager
    def holding(self, chunk: Chunk) -> Generator[None]:
        """Keep a chunk's claim alive while its rows are computed, and end it afterwards."""
        if chunk.lease is None or self._leases is None:
            yield
            return
        try:
            with self._leases.keep(chunk.lease):
                yield
        finally:
            with contextlib.suppress(StoreError):
                chunk.lease.release()
            (self._folder / f"{chunk.lease.key}{_SUFFIX}").unlink(missing_ok=True)

    def confirm(self, chunk: Chunk) -> None:
        """Check that the claim is still ours, right before its rows are committed.

        Raises:
            LeaseLostError: This process stalled, and another has taken the rows over.
        """
        if chunk.lease is not None:
            chunk.lease.renew()

    def _claim(self, leases: Leases, digests: NDArray[np.bytes_]) -> Chunk:
        key = f"rows-{self._table.subgraph[:16]}-{secrets.token_hex(8)}"
        # Named before it is claimed: a claim whose rows nobody knows would protect nothing.
        write_aside(self._folder / f"{key}{_SUFFIX}", digests.tobytes())
        return Chunk(digests, leases.claim(key, process_identity()))

    def _in_flight(self, leases: Leases) -> NDArray[np.bytes_]:
        """Return the digests in living claims, and clear away the others. The lock is held."""
        found: list[bytes] = []
        self._blocking = None
        for name in sorted(os.listdir(self._folder)):
            if not name.endswith(_SUFFIX):
                continue
            key = name.removesuffix(_SUFFIX)
            lease = leases.claim(key, process_identity())
            if lease is None:
                self._blocking = key
                with contextlib.suppress(OSError):
                    found.append((self._folder / name).read_bytes())
            else:
                # Its owner is gone: what it had committed is there, the rest is free.
                (self._folder / name).unlink(missing_ok=True)
                lease.release()
        data = b"".join(found)
        data = data[: len(data) // DIGEST_BYTES * DIGEST_BYTES]
        return np.frombuffer(data, f"S{DIGEST_BYTES}")
