import queue
import threading
from concurrent.futures import Future

import pytest
import torch

from trainonce.errors import RecoveryError
from trainonce.worker import transfer


class Wire:
    """Stands for an inner group: what one side sends, the other receives, in order."""

    def __init__(self):
        self._sent = queue.Queue()
        self._wanted = queue.Queue()
        self.pg = self
        self.num_sent = 0
        self.spoil = None
        threading.Thread(target=self._deliver, daemon=True).start()

    def _deliver(self):
        while True:
            data, sent = self._sent.get()
            out, received = self._wanted.get()
            out.view(-1).copy_(data.view(-1))
            sent.set_result(None)
            received.set_result(None)

    def send(self, data, _rank, _tag):
        data = data[0] if isinstance(data, list) else data
        self.num_sent += 1
        if self.num_sent == self.spoil:
            data = data.clone()
            data[0] ^= 1
        work = Work()
        self._sent.put((data, work))
        return work

    def recv(self, out, _rank, _tag):
        work = Work()
        self._wanted.put((out[0], work))
        return work

    def receive(self, out, rank, tag):
        self.recv([out], rank, tag).wait()


class Work(Future):
    def wait(self):
        self.result(timeout=60)


def state(fill):
    """Tensors of every kind: large, small, empty, of one element, strided, not of floats."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(3000, generator=generator)
    tensors = {
        "large": large,
        "small": torch.randn(7, generator=generator),
        "empty": torch.zeros(0),
        "step": torch.tensor(3.0),
        "strided": torch.randn(40, 50, generator=generator).t(),
        "small strided": torch.randn(4, 3, generator=generator).t(),
        "mask": torch.tensor([True, False, True]),
        "half": torch.randn(2500, generator=generator).to(torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.randn(2000, generator=generator)),
    }
    if not fill:
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
    return list(tensors.items())


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(transfer, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(transfer, "_SMALL_BYTES", 256)


def move(wire, given, taken):
    sender = Future()
    thread = threading.Thread(
        target=lambda: sender.set_result(transfer.send_state(wire, (1,), given))
    )
    thread.start()
    found = transfer.receive_parts(wire, [0], [taken])
    thread.join()
    return found, sender.result()


def test_state_of_every_layout_arrives_bit_for_bit():
    given, taken = state(fill=True), state(fill=False)
    received, sent = move(Wire(), given, taken)
    assert received == sent
    assert received[1] == sum(t.numel() * t.element_size() for _, t in given)
    for (name, theirs), (_, ours) in zip(given, taken, strict=True):
        assert torch.equal(theirs, ours), name
        assert theirs.stride() == ours.stride(), name


def test_the_digest_is_that_of_the_tensors_however_they_were_cut():
    given = state(fill=True)
    digest = transfer.Digest()
    for name, tensor in given:
        digest.add(name, transfer.as_bytes(tensor))
    received, _ = move(Wire(), given, state(fill=False))
    assert received[0] == digest.hex()


def test_large_tensors_are_cut_and_small_ones_share_a_message():
    wire = Wire()
    move(wire, state(fill=True), state(fill=False))
    # 12000, 8000, 5000 and 8000 bytes in pieces of 4096, one shared, two for the record.
    assert wire.num_sent == 3 + 2 + 2 + 2 + 1 + 2


def test_received_tensors_count_as_written_to():
    taken = state(fill=False)
    before = {name: tensor._version for name, tensor in taken}
    move(Wire(), state(fill=True), taken)
    assert all(tensor._version > before[name] for name, tensor in taken if tensor.numel())


def test_a_flipped_bit_on_the_way_is_noticed():
    wire = Wire()
    wire.spoil = 3
    with pytest.raises(RecoveryError, match="damaged"):
        move(wire, state(fill=True), state(fill=False))
