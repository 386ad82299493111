"""Moves of a rank that meet deaths and hangs: the drained worker goes on, and nothing is lost."""

import signal

import pytest

from trainonce.wire.messages import (
    Checkpoint,
    Drain,
    Drained,
    Exit,
    Formed,
    Generation,
    PeerLost,
)


@pytest.fixture
def moving(bench):
    """Return a function that asks for a move of rank 1, at step 50; the bench keeps the answers."""

    def make(**options):
        b = bench(**{"spares": 1, **options}).ready()
        b.commit(50)
        b.answers = []
        b.supervisor.migration.request(1, lambda ok, text: b.answers.append((ok, text)))
        return b

    return make


def told(process):
    """Return generation and newcomers of the last announcement that a worker has heard."""
    *_, last = process.heard(Generation)
    return last.generation, last.newcomers


def finish(b, step):
    """Let the present generation form, a spare park, and the move be done again."""
    b.form(step)
    b.commit(step + 1)
    b.step(1.0)
    b.park()
    b.step(1.0)
    moved = b.drain(1)
    b.form(step + 1)
    assert moved.heard(Exit)
    b.commit(step + 2)
    assert [ok for ok, _ in b.answers] == [True]
    assert b.job.membership.incarnation == 0, "all ranks were started again"
    assert not any(incident.steps_lost for incident in b.of_kind("incident"))


def test_a_death_before_a_rank_has_drained_voids_the_order(moving):
    b = moving()
    one = b.rank(1)
    (order,) = one.heard(Drain)
    b.rank(0).end(signum=signal.SIGKILL)
    b.step()
    assert told(one) == (2, [0])
    one.say(Drained(step=51, generation=order.generation))  # it had not heard yet
    b.step()
    assert b.job.membership.workers == (2, 1)
    finish(b, 51)
    assert [i.served_by for i in b.of_kind("incident")] == ["rebuild", "migration"]


def test_a_death_while_no_spare_is_ready_leaves_the_drained_rank_a_copy(moving):
    b = moving()
    one = b.rank(1)
    (order,) = one.heard(Drain)
    b.engine.started[2].end(signum=signal.SIGKILL)
    b.rank(0).end(signum=signal.SIGKILL)
    b.step()
    one.say(Drained(step=50, generation=order.generation))
    b.step()
    assert not one.heard(Exit)
    b.park()
    assert told(one) == (2, [0])
    finish(b, 50)


def test_a_death_while_the_successor_takes_over_lets_the_drained_worker_go_on(moving):
    b = moving()
    old, successor = b.drain(1), b.rank(1)
    b.rank(0).end(signum=signal.SIGKILL)
    b.step()
    assert successor.signals[0] is signal.SIGKILL, "it shares the rank's mirror"
    assert not old.heard(Exit)
    b.park()
    assert told(old) == (3, [0])
    assert b.rank(1) is old
    finish(b, 50)
    seen = {(i.cause, i.served_by, tuple(i.ranks)) for i in b.of_kind("incident")}
    assert seen == {
        ("migration", "predecessor", (1,)), ("signal", "rebuild", (0,)),
        ("migration", "migration", (1,)),
    }  # fmt: skip
    assert any("was to move on request at step 50; the process" in line for line in b.lines)


def test_a_hang_while_the_successor_takes_over_lets_the_drained_worker_go_on(moving):
    b = moving()
    old = b.drain(1)
    b.rank(0).stopped = True
    b.step(0.3)
    b.step(1.1)
    assert b.engine.started[0].signals[0] is signal.SIGKILL
    b.park()
    assert told(old) == (3, [0])
    finish(b, 50)


def test_one_of_three_that_dies_in_a_move_is_rebuilt_beside_the_drained_worker(moving):
    b = moving(nproc=3, spares=2)
    old = b.drain(1)
    b.rank(2).end(signum=signal.SIGKILL)
    b.step()
    assert told(old) == (3, [2])
    finish(b, 50)


def test_a_successor_whose_word_is_still_unread_keeps_the_rank(moving):
    b = moving(spares=2)
    old, successor = b.drain(1), b.rank(1)
    successor.say(Formed(generation=2, step=50))
    b.rank(0).end(signum=signal.SIGKILL)
    b.supervisor._handle_exits([b.job.holder(0)], [])  # as if that was all there is
    assert b.rank(1) is successor
    assert old.heard(Exit)
    assert told(successor) == (3, [0])


def test_a_successor_that_dies_leaves_the_rank_to_the_drained_worker(moving):
    b = moving()
    old = b.drain(1)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert told(old) == (3, [])
    finish(b, 50)
    ways = [(i.cause, i.served_by) for i in b.of_kind("incident")]
    assert ways == [
        ("migration", "predecessor"), ("signal", "predecessor"), ("migration", "migration"),
    ]  # fmt: skip


def test_a_successor_that_cannot_be_made_consistent_costs_no_restart(moving):
    b = moving()
    for generation, step in ((3, 50), (5, 51)):
        old, successor = b.drain(1), b.rank(1)
        b.form(step, ranks=[0, 1], error="no rank holds the state\nunchanged")
        assert successor.signals[0] is signal.SIGKILL
        assert told(old) == (generation, [])
        b.form(step)
        b.commit(step + 1)
        b.step(1.0)
        b.park()
        b.step(1.0)
    why = "rank 1 stays where it is: no rank holds the state; unchanged"
    assert b.answers == [(False, why)]
    assert not old.heard(Drain), "two successors are enough"
    ways = [(i.served_by, i.steps_lost) for i in b.of_kind("incident")]
    assert ways == [("predecessor", 0), ("predecessor", 0)]


def test_a_rank_does_not_move_while_another_is_stopped(moving):
    b = moving()
    b.rank(0).stopped = True
    old = b.drain(1)
    assert b.rank(1) is old, "the spare is for the one that is about to be killed"
    assert told(old) == (2, [])
    b.step(0.3)
    b.step(1.1)
    assert told(old) == (3, [0])
    finish(b, 50)


def test_a_rank_goes_on_whose_spare_has_gone_meanwhile(moving):
    b = moving()
    b.engine.started[2].end(signum=signal.SIGKILL)
    b.step()
    old = b.drain(1)
    assert told(old) == (2, [])
    finish(b, 50)


def test_both_copies_lost_in_a_move_start_all_ranks_again(moving):
    b = moving()
    b.drain(1).end(signum=signal.SIGKILL)
    b.step()
    b.rank(0).end(signum=signal.SIGKILL)
    b.step()
    b.step(1.0)
    assert b.job.membership.incarnation == 1
    assert b.job.reserve is None


def test_a_start_of_all_ranks_leaves_no_drained_worker_behind(moving):
    b = moving()
    old = b.drain(1)
    for _ in range(6):  # ranks that cannot be connected
        b.rank(0).say(PeerLost(generation=b.job.membership.generation, error="reset"))
        b.step()
        b.step(0.25)
    assert old.signals[0] is signal.SIGKILL
    assert b.job.membership.incarnation == 1
    b.ready()
    b.commit(1)
    assert [ok for ok, _ in b.answers] == [False]


def test_a_job_that_is_told_to_end_moves_nobody(moving):
    b = moving()
    one = b.rank(1)
    (order,) = one.heard(Drain)
    b.supervisor.ending.stop(signal.SIGTERM)
    one.say(Drained(step=50, generation=order.generation))
    b.step()
    assert b.rank(1) is one
    assert one.heard(Checkpoint)[0].stop


def test_moves_of_several_ranks_meet_a_death_and_are_all_done(moving):
    b = moving(nproc=3, spares=2)
    others = []
    b.supervisor.migration.request(2, lambda ok, text: others.append(ok))
    b.drain(1)
    b.rank(0).end(signum=signal.SIGKILL)
    b.step()
    assert not b.rank(2).heard(Drain)
    finish(b, 50)
    b.step(1.0)
    b.park()
    b.step(1.0)
    b.drain(2)
    b.form(52)
    b.commit(53)
    assert others == [True]
