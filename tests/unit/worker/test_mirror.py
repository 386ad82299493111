"""Local state that outlives its process."""

import os
import signal
import subprocess
import sys

import pytest

from trainonce.errors import StateError
from trainonce.worker.mirror import Mirror


@pytest.fixture
def mirror():
    mirror = Mirror.create(1000)
    yield mirror
    mirror.close()


def test_the_two_commits_before_the_present_write_are_kept(mirror):
    for commits in range(1, 6):
        mirror.publish(commits, b"early%d" % commits, final=False)
        mirror.publish(commits, b"final%d" % commits, final=True)
    assert mirror.find(5).payload == b"final5"
    mirror.publish(6, b"early6", final=False)
    assert mirror.find(5).payload == b"final5"
    assert mirror.find(6) == (6, False, b"early6")
    # A survivor may stand there: nothing was reduced since in which all ranks had to take part.
    assert mirror.find(4).payload == b"final4"
    assert mirror.find(3) is None


def test_what_is_announced_anew_for_a_commit_takes_no_further_slot(mirror):
    mirror.publish(5, b"final5", final=True)
    for announced in range(4):
        mirror.publish(6, b"early6.%d" % announced, final=False)
    heir = Mirror(os.dup(mirror.fd))
    heir.publish(6, b"early6.heir", final=False)
    assert heir.find(6).payload == b"early6.heir"
    heir.publish(6, b"final6", final=True)
    # A survivor may not have committed the sixth yet.
    assert heir.find(5).payload == b"final5"
    assert heir.find(6) == (6, True, b"final6")
    heir.close()


def test_a_torn_record_is_never_believed(mirror):
    mirror.publish(1, b"first", final=True)
    mirror.publish(2, b"second" * 50, final=True)
    view = mirror._map
    place = view.find(b"second")
    view[place] ^= 1
    assert mirror.find(2) is None
    assert mirror.find(1).payload == b"first"


def test_another_process_goes_on_where_the_first_stopped(mirror):
    mirror.publish(7, b"seven", final=True)
    heir = Mirror(os.dup(mirror.fd))
    assert heir.find(7).payload == b"seven"
    heir.publish(8, b"eight", final=True)
    assert heir.find(7).payload == b"seven"
    assert mirror.find(8).payload == b"eight"
    heir.close()


WRITER = """
import sys
from trainonce.worker.mirror import Mirror
mirror = Mirror(int(sys.argv[1]))
commits = 0
while True:
    commits += 1
    mirror.publish(commits, (b"%d " % commits) * 4000, final=True)
    if commits == 50:
        print("going", flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_the_commits_before():
    for _ in range(5):
        mirror = Mirror.create(40_000)
        os.set_inheritable(mirror.fd, True)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(mirror.fd)],
            stdout=subprocess.PIPE,
            pass_fds=[mirror.fd],
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        found = mirror._valid()
        assert len(found) >= 2
        for _, _, record in found:
            assert record.payload == (b"%d " % record.commits) * 4000
        mirror.close()


def test_memory_that_is_no_mirror_is_refused():
    fd = os.memfd_create("x")
    with pytest.raises(StateError, match="too small"):
        Mirror(fd)
    os.close(fd)


def test_a_larger_mirror_takes_over_what_the_smaller_one_holds(mirror):
    for commits in (4, 5):
        mirror.publish(commits, b"early%d" % commits, final=False)
        mirror.publish(commits, b"final%d" % commits, final=True)
    larger = Mirror.create(5000)
    for record in mirror.records():
        larger.publish(record.commits, record.payload, final=record.final)
    larger.publish(6, bytes(4000), final=False)
    assert larger.find(4).payload == b"final4"
    assert larger.find(5) == (5, True, b"final5")
    larger.close()
