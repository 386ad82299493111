"""Ranks that die and what follows; stepped on the bench of conftest.py."""

import os
import signal

import pytest

from trainonce.engines.base import ExitStatus
from trainonce.wire.messages import (
    Begin,
    Formed,
    Generation,
    Hello,
    PeerLost,
    Ready,
)


def test_a_killed_rank_goes_to_a_spare_together_with_its_mirror(bench):
    b = bench(spares=1).ready(mirrors=True)
    b.commit(50)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert b.engine.started[1].reaped
    told = [b.engine.started[w].heard(Generation) for w in (0, 2)]
    assert [(g[0].generation, g[0].rank, g[0].workers, g[0].newcomers) for g in told] == [
        (2, 0, [0, 2], [1]),
        (2, 1, [0, 2], [1]),
    ]
    assert (told[0][0].mirrors, told[1][0].mirrors) == (0, 1)
    fd = b.engine.started[2].inside.take_fd()
    assert os.pread(fd, 15, 0) == b"state of rank 1"
    os.close(fd)


def test_an_incident_tells_pause_and_recovery_and_is_told_in_one_sentence(bench):
    b = bench(spares=1).ready()
    b.commit(50)
    b.clock.advance(0.5)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    detected = b.clock.wall_s(), b.clock.mono_s()
    b.clock.advance(0.04)
    b.form(50, ranks=[0], digest="d")
    b.form(50, ranks=[1], digest="d", recompute=1, bytes_moved=1000)
    b.clock.advance(0.02)
    b.commit(51)
    (incident,) = b.of_kind("incident")
    assert (incident.ranks, incident.pids, incident.cause) == ([1], [1_000_001], "signal")
    assert (incident.detail, incident.served_by, incident.step) == ("SIGKILL", "rebuild", 50)
    # Its time is that of the detection: what is on disk by then is what a restart would find.
    assert (incident.wall_s, incident.mono_s) == pytest.approx(detected)
    assert incident.supported
    assert incident.detected_s == pytest.approx(0.5)
    assert incident.recovery_s == pytest.approx(0.04)
    assert incident.pause_s == pytest.approx(0.06)
    assert (incident.micro_batches_recomputed, incident.bytes_moved) == (1, 1000)
    assert (incident.digest_before, incident.digest_after) == ("d", "d")
    assert b.lines[-1] == (
        "rank 1 (pid 1000001) died of SIGKILL at step 50;"
        " a spare took its place: paused 60 ms, no step lost"
    )


def test_a_used_spare_is_replaced_shortly_after_the_generation_has_formed(bench):
    b = bench(spares=1).ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert len(b.engine.started) == 3
    b.form(0)
    # Starting a process takes a core from the ranks that are about to end the pause.
    assert len(b.engine.started) == 3
    b.step(advance_s=1.0)
    assert len(b.engine.started) == 4
    assert b.engine.started[3].spec.env["TRAINONCE_SPARE"] == "1"


def test_a_death_before_every_rank_is_ready_restarts_all_ranks(bench):
    b = bench()
    for worker in (0, 1):
        b.engine.started[worker].say(Hello(worker=worker, pid=1))
    b.engine.started[0].say(Ready())
    b.step()
    b.engine.started[1].end(signum=signal.SIGKILL)
    b.step()
    assert b.engine.started[0].signals == [signal.SIGKILL]
    assert b.job.membership.workers == (2, 3)
    assert b.engine.started[2].spec.env["TORCHELASTIC_RESTART_COUNT"] == "1"
    b.ready()
    b.commit(1)
    (incident,) = b.of_kind("incident")
    assert (incident.served_by, incident.steps_lost) == ("restart", 0)


def test_ranks_begin_once_all_are_ready(bench):
    b = bench()
    for worker in (0, 1):
        b.engine.started[worker].say(Hello(worker=worker, pid=1))
    b.rank(0).say(Ready())
    b.step()
    assert not b.rank(0).heard(Begin)
    b.rank(1).say(Ready())
    b.step()
    assert [len(b.rank(rank).heard(Begin)) for rank in (0, 1)] == [1, 1]


def test_a_newcomer_whose_word_is_unread_is_a_living_copy(bench):
    b = bench(spares=2).ready()
    b.commit(16)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    donor, newcomer = b.rank(0), b.rank(1)

    def dying():
        # While the launcher looks at the donor's end, the newcomer's word arrives.
        donor.dying = lambda: None
        newcomer.say(Formed(generation=2, step=16, recompute=1))
        return ExitStatus(signum=signal.SIGKILL)

    newcomer.dying = lambda: None
    donor.say(Formed(generation=2, step=16))
    b.step()
    b.job.workers[0].watched = True
    donor.dying = dying
    b.supervisor._handle_exits([], [b.job.workers[0]])
    assert b.job.membership.generation == 3
    assert b.job.membership.newcomers == {0}
    assert not b.job.restarting


def test_a_kill_during_recovery_adds_to_the_newcomers(bench):
    b = bench(nproc=4, spares=2).ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.form(0, ranks=[0])
    b.rank(2).end(signum=signal.SIGKILL)
    b.step()
    assert (b.job.membership.generation, b.job.membership.newcomers) == (3, {1, 2})
    assert b.rank(0).heard(Generation)[-1].newcomers == [1, 2]
    b.form(0)
    assert b.job.membership.is_formed
    assert not b.job.membership.newcomers


def test_a_newcomer_that_has_become_consistent_is_a_donor_in_the_next_generation(bench):
    b = bench(nproc=3, spares=2).ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.form(0, ranks=[1])
    b.rank(2).end(signum=signal.SIGKILL)
    b.step()
    assert b.job.membership.newcomers == {2}


def test_two_ranks_at_once_are_one_incident_and_one_generation(bench):
    b = bench(nproc=3, spares=2).ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.rank(2).end(signum=signal.SIGKILL)
    b.step()
    assert (b.job.membership.generation, b.job.membership.newcomers) == (2, {1, 2})
    b.form(0)
    b.commit(1)
    (incident,) = b.of_kind("incident")
    assert incident.ranks == [1, 2]
    assert "ranks 1 and 2" in b.lines[-1]


def test_a_spare_that_dies_while_it_is_promoted_is_followed_by_the_next(bench):
    b = bench(spares=2).ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    promoted = b.rank(1)
    promoted.end(signum=signal.SIGKILL)
    b.step()
    assert b.rank(1) is not promoted
    assert (b.job.membership.generation, b.job.membership.newcomers) == (3, {1})
    b.form(0)
    b.commit(1)
    assert [i.served_by for i in b.of_kind("incident")] == ["rebuild", "rebuild"]


def test_a_spare_that_dies_unused_is_replaced(bench):
    b = bench(spares=1).ready()
    b.engine.started[2].end(signum=signal.SIGKILL)
    b.step()
    assert len(b.engine.started) == 4
    assert b.job.membership.generation == 1


def test_spares_that_keep_dying_are_given_up_and_training_goes_on(bench):
    b = bench(spares=1).ready()
    b.engine.started[2].end(signum=signal.SIGKILL)
    b.step()
    for worker in (3, 4, 5):
        b.engine.started[worker].end(code=1)
        b.step()
    assert len(b.engine.started) == 6
    assert sum("no more are kept" in line for line in b.lines) == 1
    assert not b.job.is_ending


def test_with_no_spare_a_new_worker_is_started_and_the_wait_is_told(bench):
    b = bench().ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert "no spare is ready, starting a new worker" in b.lines[-1]
    assert not b.rank(0).heard(Generation)
    b.clock.advance(3)
    b.engine.started[2].say(Hello(worker=2, pid=5))
    b.step()
    assert b.engine.started[2].heard(Generation)[0].newcomers == [1]
    b.form(0)
    b.commit(1)
    (incident,) = b.of_kind("incident")
    assert incident.waited_for_spare_s == pytest.approx(3)
    assert "a new worker took its place" in b.lines[-1]


def test_a_stopped_spare_is_not_promoted(bench):
    b = bench(spares=1).ready()
    b.engine.started[2].stopped = True
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.engine.started[3].say(Hello(worker=3, pid=5))
    b.step()
    assert b.job.membership.workers == (0, 3)


def test_a_rank_that_cannot_be_rebuilt_sends_all_back_to_the_checkpoint(bench):
    b = bench(spares=1).ready()
    b.commit(50)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    (b.job.checkpoints / "step_40").mkdir(parents=True)
    b.form(50, ranks=[0], error="no living copy")
    assert b.job.membership.incarnation == 1
    for worker in b.job.membership.workers:
        b.engine.started[worker].say(Hello(worker=worker, pid=1))
        b.engine.started[worker].progress["commits"] = 40
    b.step()
    assert b.rank(0).heard(Generation)[0].resume == str(b.job.checkpoints)
    for rank in (0, 1):
        b.rank(rank).say(Ready())
    b.step()
    b.commit(41)
    (incident,) = b.of_kind("incident")
    assert (incident.served_by, incident.steps_lost) == ("checkpoint", 10)
    assert "10 steps to compute again" in b.lines[-1]


def test_when_the_last_living_copy_dies_all_ranks_start_again(bench):
    b = bench(spares=2).ready()
    b.commit(7)
    b.rank(0).end(signum=signal.SIGKILL)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert b.job.membership.incarnation == 1
    b.ready()
    b.commit(1)
    (incident,) = b.of_kind("incident")
    assert (incident.served_by, incident.steps_lost) == ("restart", 7)


def _lose_all(b):
    for rank in (0, 1):
        b.rank(rank).end(signum=signal.SIGKILL)
    b.step()
    assert b.job.membership.incarnation == 1


def test_a_connection_lost_before_all_ranks_start_again_is_none_of_theirs(bench):
    b = bench(spares=2).ready()
    b.commit(7)
    b.rank(0).say(PeerLost(generation=1, error="closed by peer"))
    b.step()
    _lose_all(b)
    b.step(advance_s=0.25)
    assert b.job.membership.generation == 1
    b.ready()
    b.commit(1)
    assert [incident.cause for incident in b.of_kind("incident")] == ["signal"]


def test_steps_lost_are_counted_where_the_ranks_connect_again_in_their_set_up(bench):
    b = bench(spares=2).ready()
    b.commit(7)
    _lose_all(b)
    for rank in (0, 1):
        b.rank(rank).say(Hello(worker=b.rank(rank).worker, pid=1))
    b.rank(0).say(PeerLost(generation=1, error="closed by peer"))
    b.step()
    b.step(advance_s=0.25)
    assert b.job.membership.generation == 2
    b.rank(0).say(Ready())
    b.form(0)  # the other is still at it: it has connected again, and is not ready
    assert not b.job.all_ready
    b.rank(1).say(Ready())
    b.step()
    assert b.job.membership.is_formed
    b.commit(1)
    incidents = b.of_kind("incident")
    assert [incident.served_by for incident in incidents] == ["restart", "reform"]
    assert sum(incident.steps_lost for incident in incidents) == 7


def test_a_checkpoint_completed_while_the_ranks_are_ended_is_told_and_resumed_from(bench):
    b = bench(spares=2).ready()
    b.commit(7)
    first, last = b.rank(0), b.rank(1)
    for process in (first, last):
        process.begin_to_die(signal.SIGKILL)
    b.step()
    assert "no rank with a living copy is left: starting all ranks again" in b.lines
    (b.job.checkpoints / "step_5").mkdir(parents=True)
    for process in (first, last):
        process.end(signum=signal.SIGKILL)
    b.step()
    assert b.lines[-1] == f"the ranks start from {b.job.checkpoints}"
    b.engine.started[b.job.membership.workers[0]].say(Hello(worker=4, pid=1))
    b.step()
    assert b.rank(0).heard(Generation)[0].resume == str(b.job.checkpoints)


def test_restarts_are_bounded(bench):
    b = bench(max_restarts=1).ready()
    for _ in range(2):
        b.rank(0).end(signum=signal.SIGKILL)
        b.rank(1).end(signum=signal.SIGKILL)
        b.step()
        if not b.job.is_ending:
            b.ready()
    assert b.supervisor.exit_code == 3


def test_a_rank_is_replaced_while_the_kernel_still_takes_it_apart(bench):
    b = bench(spares=1).ready()
    b.commit(50)
    dying = b.rank(1)
    dying.begin_to_die(signal.SIGKILL)
    b.step()
    assert not dying.reaped
    told = [b.engine.started[w].heard(Generation) for w in (0, 2)]
    assert [g[0].generation for g in told] == [2, 2]
    b.form(50)
    b.commit(51)
    dying.end(signum=signal.SIGKILL)
    b.step()
    assert dying.reaped
    assert dying.worker not in b.job.workers
    assert [(i.detail, i.served_by) for i in b.of_kind("incident")] == [("SIGKILL", "rebuild")]
    assert b.job.membership.generation == 2


def test_all_ranks_start_again_only_when_the_dying_ones_are_gone(bench):
    b = bench().ready()
    b.commit(3)
    first, second = b.rank(0), b.rank(1)
    first.begin_to_die(signal.SIGKILL)
    second.begin_to_die(signal.SIGKILL)
    b.step()
    assert len(b.engine.started) == 2
    first.end(signum=signal.SIGKILL)
    b.step()
    assert len(b.engine.started) == 2
    second.end(signum=signal.SIGKILL)
    b.step()
    assert b.job.membership.incarnation == 1
    assert len(b.engine.started) == 4
