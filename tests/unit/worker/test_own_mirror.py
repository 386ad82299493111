"""The memory of one rank's records and large variables, and what the launcher gets of it."""

import os

import pytest

from trainonce.wire.messages import Mirror as MirrorMessage
from trainonce.wire.messages import Note
from trainonce.worker.mirror import Place
from trainonce.worker.own_mirror import OwnMirror


class Rank1:
    rank = 1


@pytest.fixture
def held():
    """Descriptors that a launcher holds, newest last."""
    fds = []
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def own(held):
    def notify(message, fds=()):
        notes.append(message) if isinstance(message, Note) else None
        held.extend(map(os.dup, fds))
        assert isinstance(message, Note) or (message.rank, len(fds)) == (1, 1)
        assert isinstance(message, Note | MirrorMessage)

    notes = []
    own = OwnMirror(2, Rank1, notify)
    own.notes = notes
    return own


def heir_of(held):
    heir = OwnMirror(2, Rank1, lambda *_: None)
    heir.adopt(os.dup(held[-1]))
    return heir


def test_records_and_large_variables_outlive_growth_and_the_process(own, held):
    places, contents = [], [bytes([i]) * 10_000 for i in range(5)]
    for commits, data in enumerate(contents, start=1):
        places.append(own.keep(data, places))
        own.publish(commits, b"record%d" % commits, places, final=True)
    own.publish(6, b"long" * 100_000, places, final=True)  # beyond its slot
    assert len(held) >= 3
    heir = heir_of(held)
    assert [heir.read(place) for place in places] == contents
    assert heir.find(5) == b"record5"
    assert heir.find(6) == b"long" * 100_000
    assert heir.size_bytes == own.size_bytes == os.fstat(held[-1]).st_size


def test_what_a_record_mentions_is_not_overwritten_while_it_may_be_asked_for(own, held):
    place = own.keep(b"old" * 1000, [])
    own.publish(1, b"with old", [place], final=True)
    new = own.keep(b"new" * 1000, [])  # the variable has changed: nothing else is used
    for _ in range(10):
        own.publish(2, b"with new", [new], final=False)
    own.publish(2, b"with new", [new], final=True)
    heir = heir_of(held)
    heir.hold(2, [new])
    assert heir.read(place) == b"old" * 1000
    assert heir.keep(b"own" * 1000, []) != new
    for commits in range(3, 6):
        own.publish(commits, b"with new", [new], final=True)
    size = own.size_bytes
    assert own.keep(b"end" * 1000, [new])[:2] == place[:2]
    assert own.size_bytes == size
    assert own.read(place) == b""  # and not what is there now


def test_a_large_variable_goes_behind_the_others_where_all_gaps_are_too_small(own):
    used = [Place(999, 1), Place(1999, 1), Place(2999, 1)]
    place = own.keep(b"x" * 1000, used)
    assert place[:2] == (3000, 1000)
    assert own.read(place) == b"x" * 1000


def test_without_memory_nothing_is_kept_and_that_is_told(own, monkeypatch):
    place = own.keep(b"a" * 100, [])
    monkeypatch.setattr("trainonce.worker.own_mirror.available_bytes", lambda: 1 << 20)
    assert own.keep(b"b" * (1 << 20), [place]) is None
    assert own.read(place) == b"a" * 100
    (note,) = own.notes
    assert (note.key, note.level) == ("large-variables-memory", "warning")

    def refused(*_):
        raise OSError("no space")

    monkeypatch.undo()
    monkeypatch.setattr("trainonce.worker.mirror.os.posix_fallocate", refused)
    assert own.keep(b"b" * (1 << 20), [place]) is None
    assert "no space" in own.notes[-1].text
