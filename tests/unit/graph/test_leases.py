"""Claims: one owner at a time, take-over of the dead and stalled, fencing of the late."""

import multiprocessing
import os
import signal
import threading

import pytest

from trainonce.clock import FakeClock
from trainonce.errors import LeaseLostError
from trainonce.graph.leases import Leases, host_identity, is_dead, process_identity


@pytest.fixture
def leases(tmp_path):
    return Leases(tmp_path / "index.db", expiry_s=10.0, clock=FakeClock())


def test_only_one_owner_holds_a_claim(leases):
    lease = leases.claim("k", "a")
    assert lease is not None
    assert leases.claim("k", "b") is None
    assert leases.claim("other", "b") is not None
    lease.release()
    assert leases.claim("k", "b").token > lease.token


def test_a_counter_that_stands_still_expires_and_one_that_moves_does_not(tmp_path):
    clock = FakeClock()
    owner = Leases(tmp_path / "index.db", clock=clock)
    waiter = Leases(tmp_path / "index.db", expiry_s=10.0, clock=clock)
    lease = owner.claim("k", "a")
    for _ in range(5):
        assert waiter.claim("k", "b") is None
        clock.advance(9.0)
        lease.renew()
    assert waiter.claim("k", "b") is None
    clock.advance(10.0)
    assert waiter.claim("k", "b") is not None


def test_a_late_commit_by_a_fenced_owner_is_refused(leases, tmp_path):
    slow = leases.claim("k", "slow")
    assert leases.wait("k", timeout_s=30.0)
    fast = leases.claim("k", "fast")
    written = []
    with pytest.raises(LeaseLostError, match="fast"):
        slow.commit(lambda connection: written.append("slow"))
    with pytest.raises(LeaseLostError):
        slow.renew()
    slow.release()
    fast.commit(lambda connection: written.append("fast"))
    assert written == ["fast"]


def test_a_commit_that_fails_leaves_claim_and_file_as_they_were(leases):
    lease = leases.claim("k", "a")

    def write(connection):
        connection.execute("CREATE TABLE half(x)")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        lease.commit(write)
    lease.commit(lambda connection: connection.execute("CREATE TABLE half(x)"))


def test_wait_gives_up_after_its_timeout(tmp_path):
    clock = FakeClock()
    leases = Leases(tmp_path / "index.db", expiry_s=1000.0, clock=clock)
    leases.claim("k", "a")
    assert not leases.wait("k", timeout_s=5.0)
    assert clock.mono_s() >= 1005.0


def test_two_waiters_that_both_saw_the_expiry_do_not_both_take_over(tmp_path):
    clock = FakeClock()
    waiters = [Leases(tmp_path / "index.db", expiry_s=10.0, clock=clock) for _ in range(2)]
    waiters[0].claim("k", "dead")
    assert [w.claim("k", "early") for w in waiters] == [None, None]
    clock.advance(11.0)
    won = [w.claim("k", f"w{i}") for i, w in enumerate(waiters)]
    assert [lease is not None for lease in won] == [True, False]


def test_keep_renews_while_the_block_runs(tmp_path):
    leases = Leases(tmp_path / "index.db")
    lease = leases.claim("k", "a")
    with leases.keep(lease, every_s=0.001):
        while leases.holder("k").beat < 3:
            pass
    assert not [t for t in threading.enumerate() if t.name == "lease-heartbeat"]


def test_a_living_owner_beats_more_often_than_a_short_expiry(tmp_path):
    leases = Leases(tmp_path / "index.db", expiry_s=1.9)  # less than HEARTBEAT_S
    waiter = Leases(tmp_path / "index.db", expiry_s=1.9)
    lease = leases.claim("k", "a")
    with leases.keep(lease):
        assert not waiter.wait("k", 2.2)
    lease.commit()


def test_a_process_that_is_gone_is_known_to_be_dead():
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    child.start()
    me = process_identity()
    home = f"{host_identity()}|{child.pid}|"
    assert not is_dead(me)
    assert is_dead(me[: me.rindex("|")] + "|0")  # the pid was given to another process
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert is_dead(home + "1")
    assert not is_dead("another-host,,|1|1")


def claim_all(path, number, results):
    leases = Leases(path)
    won = [key for key in range(60) if leases.claim(str(key), f"p{number}")]
    results.put(won)
    results.close()
    results.join_thread()
    signal.pause()


def test_a_crowd_of_processes_has_one_winner_for_each_key_even_from_the_start(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=claim_all, args=(tmp_path / "index.db", number, results))
        for number in range(4)
    ]
    for child in children:
        child.start()
    won = [key for _ in children for key in results.get()]
    assert sorted(won) == list(range(60))
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    # All owners are dead: their claims are free at once, with no waiting.
    assert Leases(tmp_path / "index.db").claim("0", "next") is not None
