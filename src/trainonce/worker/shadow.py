"""A copy of this rank's state in memory that outlives the process.

For state of which no other rank holds a copy. The worker makes the memory, the launcher holds a
descriptor of it, and whoever takes the rank over reads it. Two slots are written in turn,
each with a checksum, by a thread behind the next step's computation; the step's update waits
for it, so that what is copied is the state of one commit. A process killed while it writes
leaves the slot before intact.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from trainonce.errors import ConfigError, RecoveryError
from trainonce.wire.messages import Note
from trainonce.wire.messages import Shadow as ShadowMessage
from trainonce.worker.transfer import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainonce.worker.state import Named

# Magic, format, serial, commits, lengths of record, payload and tensors, XXH3-64 of them.
_HEADER = struct.Struct("<4sIQQQQQQ")
_CRC = struct.Struct("<I")
_MAGIC = b"TOSh"
_FORMAT = 1
_SLOTS = 2
_PAGE = 4096
# Copied and then taken into the checksum while it is in the cache.
_PIECE_BYTES = 4 << 20
_SLACK_BYTES = 256 << 10
# Of the memory that is free, what all shadows of this host may take.
_SHARE = 0.75


@dataclass(frozen=True)
class Copy:
    """What one slot holds.

    Attributes:
        record: What is needed beside the bytes: as the owner described it.
        payload: The rank's own state.
        data: The bytes of all tensors, back to back; 1-D uint8, in the shared memory.
    """

    record: dict[str, Any]
    payload: bytes
    data: torch.Tensor


class ShadowMemory:
    """One rank's shared memory.

    Args:
        fd: Descriptor of the memory; owned by this object from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size_bytes = os.fstat(fd).st_size
        if self.size_bytes < _SLOTS * 2 * _PAGE:
            raise RecoveryError(f"a shadow of {self.size_bytes} bytes is too small to be one")
        self._slot_bytes = self.size_bytes // _SLOTS
        self._map = mmap.mmap(fd, self.size_bytes)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._serial = max((header[0] for header in self._headers()), default=0)

    @classmethod
    def create(cls, content_bytes: int) -> ShadowMemory:
        """Make memory whose slots hold at least `content_bytes` each.

        Raises:
            OSError: There is not enough of it.
        """
        slot = -(-(content_bytes + _PAGE) // _PAGE) * _PAGE
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        available = _available_bytes()
        if slot * _SLOTS * ranks > _SHARE * available:
            raise MemoryError(
                f"{ranks} times {slot * _SLOTS >> 20} MiB, and {available >> 20} MiB are free"
            )
        fd = os.memfd_create("trainonce-shadow", os.MFD_CLOEXEC)
        try:
            # Not just its size: a page that cannot be had would be a SIGBUS later.
            os.posix_fallocate(fd, 0, slot * _SLOTS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd)

    def fits(self, content_bytes: int) -> bool:
        """Tell whether so much can be written."""
        return content_bytes + _PAGE <= self._slot_bytes

    def write(self, commits: int, record: bytes, payload: bytes, tensors: Named) -> None:
        """Write the state of `commits` committed steps over the older slot."""
        serial = self._serial + 1
        base = (serial % _SLOTS) * self._slot_bytes
        # The header goes invalid first and valid last, so a torn write is never believed.
        self._map[base : base + 4] = b"\0\0\0\0"
        checksum = xxhash.xxh3_64()
        place = base + _PAGE
        for part in (record, payload):
            self._map[place : place + len(part)] = part
            checksum.update(part)
            place += len(part)
        begin = place
        for _, tensor in tensors:
            source = as_bytes(tensor)
            for first in range(0, source.numel(), _PIECE_BYTES):
                piece = source[first : first + _PIECE_BYTES]
                copied = self._bytes[place : place + piece.numel()]
                copied.copy_(piece)
                checksum.update(copied.numpy().data)
                place += piece.numel()
        header = _HEADER.pack(
            _MAGIC, _FORMAT, serial, commits, len(record), len(payload), place - begin,
            checksum.intdigest(),
        )  # fmt: skip
        self._map[base : base + _PAGE] = (header + _CRC.pack(zlib.crc32(header))).ljust(
            _PAGE, b"\0"
        )
        self._serial = serial

    def commits(self) -> list[int]:
        """Return for which numbers of committed steps there is a whole copy, newest first."""
        return [header[1] for header in sorted(self._headers(), reverse=True)]

    def read(self, commits: int) -> Copy:
        """Return the copy for `commits` committed steps.

        Raises:
            RecoveryError: There is none, or it does not match its checksum.
        """
        for serial, found, record_bytes, payload_bytes, data_bytes, checksum in self._headers():
            if found != commits:
                continue
            begin = (serial % _SLOTS) * self._slot_bytes + _PAGE
            content = self._bytes[begin : begin + record_bytes + payload_bytes + data_bytes]
            if xxhash.xxh3_64_intdigest(content.numpy().data) != checksum:
                raise RecoveryError(f"the shadow of step {commits} does not match its checksum")
            record, payload, data = content.split([record_bytes, payload_bytes, data_bytes])
            return Copy(json.loads(bytes(record.numpy())), bytes(payload.numpy()), data)
        raise RecoveryError(f"there is no whole shadow of step {commits}")

    def close(self) -> None:
        """Close the descriptor; the memory is unmapped with its last view."""
        os.close(self.fd)

    def _headers(self) -> list[tuple[int, int, int, int, int, int]]:
        found: list[tuple[int, int, int, int, int, int]] = []
        for slot in range(_SLOTS):
            base = slot * self._slot_bytes
            header = self._map[base : base + _HEADER.size]
            (crc,) = _CRC.unpack_from(self._map, base + _HEADER.size)
            magic, version, *rest = _HEADER.unpack(header)
            if magic != _MAGIC or version != _FORMAT or zlib.crc32(header) != crc:
                continue
            serial, commits, record_bytes, payload_bytes, data_bytes, checksum = rest
            if _PAGE + record_bytes + payload_bytes + data_bytes <= self._slot_bytes:
                found.append((serial, commits, record_bytes, payload_bytes, data_bytes, checksum))
        return found


class Shadow:
    """Keeps the copy up to date.

    Args:
        notify: Sends a message to the launcher, and descriptors with it.
    """

    def __init__(self, notify: Callable[..., object]) -> None:
        self.every = 0
        """Steps from one copy to the next; 0 where none is kept."""
        self.wanted: int | None = None
        """What the script asked for; None: a copy where the state has no other."""
        self._notify = notify
        self._memory: ShadowMemory | None = None
        self._thread: threading.Thread | None = None
        self._told = False

    # ------------------------------------------------------------------ keeping it

    def settle(self, table: Sequence[str]) -> None:
        """Decide how often to copy.

        Args:
            table: Shard key by rank.
        """
        alone = min(table.count(key) for key in set(table)) == 1
        self.every = int(alone) if self.wanted is None else self.wanted

    def is_due(self, commits: int) -> bool:
        """Tell whether the state of `commits` committed steps is to be copied."""
        return self.every > 0 and commits % self.every == 0

    def begin(
        self,
        commits: int,
        rank: int,
        describe: Callable[[], dict[str, Any]],
        payload: bytes,
        tensors: Named,
    ) -> None:
        """Copy in the background. The tensors must not change before `wait` returns.

        Args:
            commits: Committed steps of this state.
            rank: Whose it is.
            describe: Returns, on another thread, what is needed beside the bytes.
            payload: The rank's own state.
            tensors: The state.
        """
        self.wait()
        device = next((t.device for _, t in tensors if t.is_cuda), None)
        stream = torch.cuda.Stream(device) if device is not None else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))

        def copy() -> None:
            try:
                with torch.cuda.stream(stream):
                    self._write(commits, rank, json.dumps(describe()).encode(), payload, tensors)
            except (OSError, MemoryError) as error:
                self._complain(error)

        self._thread = threading.Thread(target=copy, name=f"shadow-{commits}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the copy under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self, commits: int, rank: int, record: bytes, payload: bytes, tensors: Named
    ) -> None:
        size = sum(t.numel() * t.element_size() for _, t in tensors) + len(record) + len(payload)
        old = self._memory
        if old is not None and old.fits(size):
            old.write(commits, record, payload, tensors)
            return
        memory = ShadowMemory.create(size + _SLACK_BYTES + 2 * (len(record) + len(payload)))
        memory.write(commits, record, payload, tensors)
        # Only now: until then the launcher keeps the one before.
        self._memory = memory
        self._notify(ShadowMessage(rank=rank, size_bytes=memory.size_bytes), (memory.fd,))
        if old is not None:
            old.close()
        if rank == 0:
            self._tell_cost(memory.size_bytes)

    def _tell_cost(self, size_bytes: int) -> None:
        often = "step" if self.every == 1 else f"{self.every} steps"
        lost = "" if self.every == 1 else f"; a loss costs up to {self.every} steps"
        self._notify(
            Note(
                key=f"shadow-{size_bytes}",
                text=f"a shadow of the state is kept in memory, {size_bytes / 1e6:.1f} MB a rank,"
                f" {size_bytes / _SLOTS / 1e6:.1f} MB copied after every {often}{lost}",
            )
        )

    def _complain(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            self._notify(
                Note(
                    key="shadow-memory",
                    level="warning",
                    text=f"there is no memory for a shadow of the state ({error}): a lost rank"
                    " costs a resume from the last checkpoint",
                )
            )

    # ------------------------------------------------------------------ taking over

    def adopt(self, fd: int) -> None:
        """Go on with the memory of the process that held this rank."""
        if self._memory is None:
            self._memory = ShadowMemory(fd)
        else:  # announced as a newcomer once more, though it is none any longer
            os.close(fd)

    def commits(self) -> list[int]:
        """Return for which numbers of committed steps there is a whole copy, newest first."""
        return [] if self._memory is None else self._memory.commits()

    def read(self, commits: int) -> Copy:
        """Return the copy for `commits` committed steps.

        Raises:
            RecoveryError: There is none, or it does not match its checksum.
        """
        if self._memory is None:
            raise RecoveryError("the process that held this rank left no shadow of its state")
        return self._memory.read(commits)


def fill(tensors: Named, data: torch.Tensor) -> int:
    """Write the bytes of a copy into `tensors`; return how many."""
    offset = 0
    with torch.no_grad():
        for _, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            part = data[offset : offset + size]
            if size:
                # A copy: bytes back to back need not be aligned to the dtype.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
            offset += size
    if offset != data.numel():
        raise RecoveryError(f"the shadow holds {data.numel()} bytes of state, not {offset}")
    return offset


def check_redundancy(required: int, table: Sequence[str], *, shadow: bool) -> None:
    """Refuse to start where some of the state has too few copies beside the one in use.

    Args:
        required: How many are promised.
        table: Shard key by rank.
        shadow: Whether a shadow is kept.

    Raises:
        ConfigError: Names the ranks.
    """
    short = [
        rank for rank, key in enumerate(table) if table.count(key) - 1 + int(shadow) < required
    ]
    if short:
        raise ConfigError(
            f"--require-redundancy {required}, and the state of ranks {_some(short)} has"
            f" {min(table.count(table[rank]) - 1 + int(shadow) for rank in short)} further copies",
            hint="give the mesh a replicate axis, or keep a shadow:"
            " run.protect(..., shadow_every=1)",
        )


def _some(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return ", ".join(map(str, ranks[:4])) + more


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62
