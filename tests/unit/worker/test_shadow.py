"""The copy of a rank's state in memory that outlives its process."""

import os
import signal

import pytest
import torch

from trainonce.errors import ConfigError, RecoveryError
from trainonce.wire.messages import Note
from trainonce.wire.messages import Shadow as ShadowMessage
from trainonce.worker.shadow import Shadow, ShadowMemory, check_redundancy, fill


def state(step):
    return [
        ("w", torch.full((1000,), float(step))),
        ("n", torch.tensor(step)),
        ("odd", torch.arange(7, dtype=torch.uint8)),
        ("h", torch.ones(3).half() * step),
    ]


def write(memory, step):
    memory.write(step, b'{"step": %d}' % step, b"payload %d" % step, state(step))


def assert_holds(memory, step):
    copy = memory.read(step)
    assert copy.record == {"step": step}
    assert copy.payload == b"payload %d" % step
    found = [(name, torch.zeros_like(tensor)) for name, tensor in state(step)]
    fill(found, copy.data)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, state(step), strict=True))


def test_the_last_two_copies_are_there_for_whoever_has_the_descriptor():
    memory = ShadowMemory.create(10_000)
    assert memory.commits() == []
    for step in (4, 5, 6):
        write(memory, step)
    other = ShadowMemory(os.dup(memory.fd))
    assert other.commits() == [6, 5]
    assert_holds(other, 6)
    assert_holds(other, 5)
    write(other, 7)
    assert memory.commits() == [7, 6]
    with pytest.raises(RecoveryError, match="no whole shadow of step 5"):
        memory.read(5)


def test_a_process_killed_while_it_writes_leaves_the_copy_before():
    memory = ShadowMemory.create(10_000)
    write(memory, 1)
    write(memory, 2)
    child = os.fork()
    if child == 0:

        class Deadly:
            def __iter__(self):
                yield from state(3)[:2]
                os.kill(os.getpid(), signal.SIGKILL)

        memory.write(3, b"{}", b"", Deadly())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert memory.commits() == [2]
    assert_holds(memory, 2)


def test_a_flipped_bit_is_noticed():
    memory = ShadowMemory.create(10_000)
    write(memory, 1)
    memory.read(1).data[4001] ^= 4
    with pytest.raises(RecoveryError, match="does not match its checksum"):
        memory.read(1)


def test_bytes_that_do_not_fit_the_tensors_are_refused():
    with pytest.raises(RecoveryError, match="9 bytes of state, not 8"):
        fill([("w", torch.zeros(2))], torch.zeros(9, dtype=torch.uint8))


def test_the_launcher_gets_new_memory_only_once_it_holds_a_whole_copy():
    sent = []

    def notify(message, fds=()):
        held = [ShadowMemory(os.dup(fd)).commits() for fd in fds]
        sent.append((type(message), held))

    shadow = Shadow(notify)
    shadow.settle(["a", "b"])
    assert shadow.every == 1
    for step, size in ((1, 10), (2, 10), (3, 1 << 20)):
        shadow.begin(step, 0, lambda step=step: {"step": step}, b"", [("w", torch.ones(size))])
    shadow.wait()
    assert [held for kind, held in sent if kind is ShadowMessage] == [[[1]], [[3]]]
    assert {kind for kind, _ in sent} == {ShadowMessage, Note}
    assert shadow.commits() == [3]


def test_where_every_part_has_a_copy_none_is_kept_unless_asked_for():
    shadow = Shadow(lambda *_: None)
    shadow.settle(["a", "b", "a", "b"])
    assert shadow.every == 0
    shadow.wanted = 3
    shadow.settle(["a", "b", "a", "b"])
    assert [step for step in range(7) if shadow.is_due(step)] == [0, 3, 6]


def test_redundancy_that_is_promised_counts_replicas_and_the_shadow():
    check_redundancy(0, ["a"], shadow=False)
    check_redundancy(1, ["a", "a"], shadow=False)
    check_redundancy(1, ["a", "b"], shadow=True)
    with pytest.raises(ConfigError, match="state of ranks 1 has 0 further copies"):
        check_redundancy(1, ["a", "b", "a"], shadow=False)
    with pytest.raises(ConfigError, match="has 1 further copies"):
        check_redundancy(2, ["a", "a"], shadow=False)


def test_without_memory_none_is_kept_and_that_is_said_once(monkeypatch):
    monkeypatch.setattr("trainonce.worker.shadow._available_bytes", lambda: 1 << 20)
    told = []
    shadow = Shadow(lambda message, fds=(): told.append(message))
    shadow.settle(["a"])
    for step in (1, 2):
        shadow.begin(step, 0, dict, b"", [("w", torch.ones(1 << 20))])
    shadow.wait()
    assert shadow.commits() == []
    (note,) = told
    assert note.level == "warning"
    assert "no memory for a shadow" in note.text
