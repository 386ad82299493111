"""Bytes from one rank to another over the inner group, whole and checked.

State goes straight from the memory of the donor's tensors into that of the newcomer's, in
pieces of which two are under way while one is being checked. Small tensors share messages.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash

from trainonce.errors import RecoveryError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from trainonce.worker.inner import InnerGroup

_TAG = 0x0A11
# Large enough that a message costs nothing, small enough that checking one overlaps with
# moving the next.
_PIECE_BYTES = 16 << 20
# Tensors below this share messages, each of at most a piece.
_SMALL_BYTES = 1 << 18
_IN_FLIGHT = 2


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of `tensor` as 1-D uint8, without a copy where its layout allows."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8) if flat.dtype != torch.uint8 else flat


def checksum(data: torch.Tensor) -> int:
    """Return the XXH3-64 of 1-D uint8 `data` on the CPU. Against accidents, not malice."""
    return xxhash.xxh3_64_intdigest(data.numpy().data)


class Digest:
    """Accumulates a digest over named tensors: their XXH3-64 checksums, hashed with BLAKE2b.

    Against accidents, not against malice.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, name: str, data: torch.Tensor) -> None:
        """Take in the bytes (1-D uint8, CPU) of `name`."""
        self.add_checksum(name, data.numel(), checksum(data))

    def add_checksum(self, name: str, num_bytes: int, checksum: int) -> None:
        """Take in the XXH3-64 of the `num_bytes` bytes of `name`."""
        self._hash.update(f"{name}:{num_bytes}:{checksum:016x};".encode())

    def hex(self) -> str:
        """Return the digest so far."""
        return self._hash.hexdigest()


def send_record(inner: InnerGroup, target: int, record: dict[str, Any]) -> None:
    """Send a JSON object."""
    data = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    inner.send(torch.tensor([data.numel()]), target, _TAG)
    inner.send(data, target, _TAG)


def receive_record(inner: InnerGroup, source: int) -> dict[str, Any]:
    """Receive a JSON object."""
    size = torch.zeros(1, dtype=torch.int64)
    inner.receive(size, source, _TAG)
    data = torch.zeros(int(size), dtype=torch.uint8)
    inner.receive(data, source, _TAG)
    return json.loads(bytes(data.numpy()))


def send_tensors(inner: InnerGroup, target: int, tensors: Sequence[torch.Tensor]) -> None:
    """Send contiguous CPU tensors with their shapes and dtypes."""
    layout = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
    send_record(inner, target, {"tensors": layout})
    for tensor in tensors:
        if tensor.numel():
            inner.send(as_bytes(tensor), target, _TAG)


def receive_tensors(inner: InnerGroup, source: int) -> list[torch.Tensor]:
    """Receive what `send_tensors` sent, as new tensors."""
    found: list[torch.Tensor] = []
    for dtype, shape in receive_record(inner, source)["tensors"]:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.numel():
            inner.receive(as_bytes(tensor), source, _TAG)
        found.append(tensor)
    return found


class _Run(NamedTuple):
    """Bytes `begin` to `end` of the tensor at one place of the list."""

    place: int
    begin: int
    end: int


def _messages(sizes: Sequence[int]) -> list[list[_Run]]:
    """Cut tensors of these sizes into messages. Both sides must come to the same."""
    found: list[list[_Run]] = []
    shared: list[_Run] = []
    for index, size in enumerate(sizes):
        if 0 < size < _SMALL_BYTES:
            if sum(run.end for run in shared) + size > _PIECE_BYTES:
                found.append(shared)
                shared = []
            shared.append(_Run(index, 0, size))
    if shared:
        found.append(shared)
    for index, size in enumerate(sizes):
        if size >= _SMALL_BYTES:
            found.extend(
                [_Run(index, begin, min(begin + _PIECE_BYTES, size))]
                for begin in range(0, size, _PIECE_BYTES)
            )
    return found


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Checksums:
    """XXH3-64 of every tensor, taken in run by run."""

    def __init__(self, count: int) -> None:
        self._states = [xxhash.xxh3_64() for _ in range(count)]

    def update(self, run: _Run, data: torch.Tensor) -> None:
        self._states[run.place].update(data.numpy().data)

    def digest(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
        digest = Digest()
        for (name, tensor), state in zip(tensors, self._states, strict=True):
            digest.add_checksum(name, _num_bytes(tensor), state.intdigest())
        return digest.hex()


def send_state(
    inner: InnerGroup, targets: Iterable[int], tensors: Sequence[tuple[str, torch.Tensor]]
) -> tuple[str, int]:
    """Send named tensors, of any device and layout; return their digest and size in bytes."""
    sizes = [_num_bytes(tensor) for _, tensor in tensors]
    checksums = _Checksums(len(tensors))
    host: dict[int, torch.Tensor] = {}
    under_way: deque[list[Any]] = deque()
    for message in _messages(sizes):
        parts: list[torch.Tensor] = []
        for run in message:
            if run.begin == 0:
                host[run.place] = as_bytes(tensors[run.place][1]).cpu()
            parts.append(host[run.place][run.begin : run.end])
            if run.end == sizes[run.place]:
                del host[run.place]
        data = parts[0] if len(parts) == 1 else torch.cat(parts)
        under_way.append([inner.pg.send([data], target, _TAG) for target in targets])
        for run, part in zip(message, parts, strict=True):
            checksums.update(run, part)
        while len(under_way) >= _IN_FLIGHT:
            _wait_all(under_way.popleft())
    for works in under_way:
        _wait_all(works)
    digest, total = checksums.digest(tensors), sum(sizes)
    for target in targets:
        send_record(inner, target, {"digest": digest, "bytes": total})
    return digest, total


def _wait_all(works: list[Any]) -> None:
    for work in works:
        work.wait()


def agree_on_digest(inner: InnerGroup, sources: Sequence[int], place: int, digest: str) -> str:
    """Return one digest of all parts in the first of `sources`, none in the others.

    Args:
        inner: The group.
        sources: Ranks that each sent one part.
        place: This rank's place among them.
        digest: Of the part that it sent.
    """
    if place > 0:
        send_record(inner, sources[0], {"digest": digest})
        return ""
    others = [receive_record(inner, source)["digest"] for source in sources[1:]]
    return _digest_of_parts([digest, *others])


def _digest_of_parts(digests: Sequence[str]) -> str:
    if len(digests) == 1:
        return digests[0]
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def receive_parts(
    inner: InnerGroup,
    sources: Sequence[int],
    parts: Sequence[Sequence[tuple[str, torch.Tensor]]],
) -> tuple[str, int]:
    """Receive from every source its part, at the same time, in the sizes that were sent.

    Returns:
        Digest and size in bytes of all parts.

    Raises:
        RecoveryError: What arrived is not what was sent.
    """
    found: list[tuple[str, int]] = [("", 0)] * len(sources)

    def receive(place: int) -> Generator[None]:
        found[place] = yield from _receive_part(inner, sources[place], parts[place])

    under_way = deque(receive(place) for place in range(len(sources)))
    while under_way:
        each = under_way.popleft()
        if next(each, _OVER) is not _OVER:
            under_way.append(each)
    return _digest_of_parts([digest for digest, _ in found]), sum(size for _, size in found)


_OVER = object()


def _receive_part(
    inner: InnerGroup, source: int, tensors: Sequence[tuple[str, torch.Tensor]]
) -> Generator[None, None, tuple[str, int]]:
    """Receive named tensors, in the order and sizes that were sent; yields after each message."""
    sizes = [_num_bytes(tensor) for _, tensor in tensors]
    checksums = _Checksums(len(tensors))
    landing = _Landing(tensors)
    under_way: deque[tuple[list[_Run], torch.Tensor, Any]] = deque()

    def finish_one() -> None:
        message, data, work = under_way.popleft()
        work.wait()
        offset = 0
        for run in message:
            part = data[offset : offset + run.end - run.begin]
            offset += part.numel()
            checksums.update(run, part)
            landing.landed(run, part)

    for message in _messages(sizes):
        data = landing.prepare(message)
        under_way.append((message, data, inner.pg.recv([data], source, _TAG)))
        if len(under_way) == _IN_FLIGHT:
            yield
            finish_one()
    while under_way:
        yield
        finish_one()
    found = {"digest": checksums.digest(tensors), "bytes": sum(sizes)}
    sent = receive_record(inner, source)
    if sent != found:
        raise RecoveryError(
            f"the state arrived damaged: {found['bytes']} bytes with digest {found['digest']},"
            f" rank {source} sent {sent['bytes']} bytes with digest {sent['digest']}"
        )
    return str(found["digest"]), sum(sizes)


class _Landing:
    """Memory to receive into: the tensors' own where it can be, else a copy on the host."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._tensors = [tensor for _, tensor in tensors]
        self._host: dict[int, torch.Tensor] = {}

    def prepare(self, message: list[_Run]) -> torch.Tensor:
        """Return where to receive `message` into, 1-D uint8 on the CPU."""
        if len(message) > 1:
            return torch.empty(sum(run.end for run in message), dtype=torch.uint8)
        (run,) = message
        return self._bytes_of(run)[run.begin : run.end]

    def landed(self, run: _Run, part: torch.Tensor) -> None:
        """Take note that `part` arrived; after its last part a tensor has its values."""
        here = self._bytes_of(run)[run.begin : run.end]
        if here.data_ptr() != part.data_ptr():
            here.copy_(part)
        tensor = self._tensors[run.place]
        if run.end < _num_bytes(tensor):
            return
        data = self._host.pop(run.place)
        with torch.no_grad():
            if _is_plain(tensor):
                # What gloo wrote, autograd has not seen.
                torch.autograd.graph.increment_version(tensor)
            else:
                tensor.copy_(data.view(tensor.dtype).view(tensor.shape))

    def _bytes_of(self, run: _Run) -> torch.Tensor:
        if run.place not in self._host:
            tensor = self._tensors[run.place]
            self._host[run.place] = (
                as_bytes(tensor)
                if _is_plain(tensor)
                else torch.empty(_num_bytes(tensor), dtype=torch.uint8)
            )
        return self._host[run.place]


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()
