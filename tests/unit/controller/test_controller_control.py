"""Hangs, moves, lost connections, fault plans; stepped on the bench."""

import signal

import pytest

from trainonce.controller.control_socket import status
from trainonce.wire.messages import (
    Begin,
    Committed,
    Done,
    Drain,
    Drained,
    DumpCollectives,
    Exit,
    FaultFiring,
    Generation,
    Hello,
    PeerLost,
    Ready,
)
from trainonce.wire.progress import Phase


def test_each_rank_learns_its_rank_and_membership_from_the_first_generation(bench):
    b = bench()
    for worker in (0, 1):
        b.engine.started[worker].say(Hello(worker=worker, pid=1))
    b.step()
    first = [b.engine.started[w].heard(Generation)[0] for w in (0, 1)]
    assert [(g.generation, g.rank, g.workers, g.newcomers) for g in first] == [
        (1, 0, [0, 1], []),
        (1, 1, [0, 1], []),
    ]
    assert first[0].store_port == 1234


def test_spares_are_started_once_the_script_is_known_to_use_trainonce(bench):
    b = bench(spares=2)
    assert len(b.engine.started) == 2
    b.engine.started[0].say(Hello(worker=0, pid=1))
    b.step()
    assert len(b.engine.started) == 4
    env = b.engine.started[2].spec.env
    assert env["TRAINONCE_SPARE"] == "1"
    assert not {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"} & set(env)
    assert env["WORLD_SIZE"] == "2"


def test_a_stopped_rank_is_killed_and_replaced(bench):
    b = bench(spares=1).ready()
    b.rank(0).stopped = True
    b.step(0.5)
    b.step(0.5)
    assert not b.rank(0).signals
    b.step(0.8)
    assert b.engine.started[0].signals == [signal.SIGKILL]
    assert b.engine.started[1].heard(DumpCollectives)
    b.form(0)
    b.commit(1)
    (incident,) = b.of_kind("incident")
    assert (incident.cause, incident.detected_by, incident.ranks) == (
        "hang",
        "stopped process",
        [0],
    )


def test_a_rank_that_the_others_wait_for_is_killed_after_the_limit(bench):
    b = bench(spares=1).ready()
    b.commit(5)
    b.rank(0).progress["phase"] = Phase.WAITING
    b.rank(1).progress["phase"] = Phase.COMPUTING
    b.step(59)
    assert not b.rank(1).signals
    b.step(2)
    b.step(0.5)
    assert b.engine.started[1].signals == [signal.SIGKILL]
    assert not b.engine.started[0].signals
    assert list((b.job.logs.folder).glob("hang_*"))
    b.form(5)
    b.commit(6)
    (incident,) = b.of_kind("incident")
    assert incident.detail.startswith("no progress for 61.0 s, limit 60.0 s")


def test_a_lost_connection_with_nobody_dead_forms_the_same_members_again(bench):
    b = bench().ready()
    b.rank(0).say(PeerLost(generation=1, error="reset"))
    b.rank(1).say(PeerLost(generation=1, error="reset"))
    b.step()
    assert b.job.membership.generation == 1
    b.step(0.25)
    assert [b.rank(r).heard(Generation)[0].newcomers for r in (0, 1)] == [[], []]
    assert b.job.membership.generation == 2
    b.form(0)
    b.commit(1)
    (incident,) = b.of_kind("incident")
    assert (incident.cause, incident.served_by, incident.ranks) == ("connection", "reform", [])


def test_a_lost_connection_is_explained_by_a_death_that_follows(bench):
    b = bench(spares=1).ready()
    b.rank(0).say(PeerLost(generation=1, error="reset"))
    b.step()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.step(0.25)
    assert b.job.membership.generation == 2
    assert b.job.incidents.total == 1


def test_spares_hear_of_the_first_steps(bench):
    b = bench(spares=1).ready()
    for step in (1, 2, 3, 4, 5):
        b.commit(step)
    assert [m.step for m in b.engine.started[2].heard(Committed)] == [1, 2, 3]


def test_migration_moves_a_rank_without_killing_it(bench):
    b = bench(spares=1).ready()
    b.commit(120)
    answers = []
    b.supervisor.migration.request(1, lambda ok, text: answers.append((ok, text)))
    old = b.drain(1)
    assert b.job.membership.workers == (0, 2)
    b.form(120, ranks=[0])
    assert not old.heard(Exit), "its successor is not consistent yet"
    b.form(120, ranks=[1], recompute=1)
    assert old.heard(Exit)
    assert not old.signals
    old.end(code=0)
    b.commit(121)
    (incident,) = b.of_kind("incident")
    assert (incident.served_by, incident.planned, incident.cause) == (
        "migration",
        True,
        "migration",
    )
    assert incident.micro_batches_recomputed == 0
    assert answers == [(True, b.lines[-1])]


def test_a_move_that_waits_for_a_worker_starts_none_once_the_job_has_ended(bench):
    b = bench().ready()
    b.supervisor.migration.request(0, lambda ok, text: None)
    for rank in (0, 1):
        b.rank(rank).say(Done(step=5))
    b.step(1.0)
    for rank in (0, 1):
        b.rank(rank).end()
    b.step(1.0)
    assert b.supervisor.is_over
    assert len(b.engine.started) == 3


def test_migration_without_a_spare_waits_for_a_new_worker(bench):
    b = bench().ready()
    b.commit(3)
    b.supervisor.migration.request(0, lambda ok, text: None)
    assert len(b.engine.started) == 3
    assert not b.rank(0).heard(Drain)
    b.park()
    assert b.rank(0).heard(Drain)


def test_a_rank_that_dies_while_it_drains_is_rebuilt(bench):
    b = bench(spares=1).ready()
    answers = []
    b.supervisor.migration.request(1, lambda ok, text: answers.append((ok, text)))
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert b.job.membership.newcomers == {1}
    assert answers[0][0] is False
    b.form(0)
    b.commit(1)
    assert b.of_kind("incident")[0].served_by == "rebuild"


@pytest.mark.parametrize(("rank", "why"), [(5, "no rank 5"), (-1, "no rank -1")])
def test_a_migration_that_makes_no_sense_is_refused(bench, rank, why):
    answers = []
    bench().ready().supervisor.migration.request(rank, lambda ok, text: answers.append((ok, text)))
    assert not answers[0][0]
    assert why in answers[0][1]


def test_a_worker_that_breaks_the_protocol_is_replaced(bench):
    b = bench(spares=1).ready()
    b.rank(1).say(Exit())
    b.step()
    assert b.job.membership.newcomers == {1}


def test_reset_by_the_plan_re_forms_while_a_rank_waits_before_the_step(bench):
    b = bench(chaos="reset step=4").ready()
    b.commit(4)
    assert b.job.membership.generation == 1
    assert b.meet(0, rank=0)
    assert b.job.membership.generation == 2
    b.form(4)
    b.commit(5)
    assert b.of_kind("incident")[0].chaos


def test_migration_by_the_plan_drains_the_rank(bench):
    b = bench(spares=1, chaos="migrate rank=0 step=2").ready()
    b.commit(2)
    b.rank(0).say(FaultFiring(index=0, step=2, point="begin"))
    b.step()
    # So it drains at the end of that very step, however far the launcher is behind.
    assert [type(message) for message in b.rank(0).heard()] == [Drain, Begin]


def test_a_rank_waits_for_its_fault_until_the_others_are_whole_and_never_in_vain(bench):
    b = bench(nproc=3, spares=1, chaos="migrate rank=0 step=2; migrate rank=0 step=3").ready()
    b.commit(2)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert not b.meet(0, rank=0)
    b.form(2)
    b.rank(0).heard(Generation)
    assert not b.rank(0).heard()  # the spare is used up, and the next to start
    b.step(advance_s=1.0)
    b.park()
    assert [type(message) for message in b.rank(0).heard()] == [Drain, Begin]
    # It is still to be moved when the next one comes: that one waits, and the rank does not.
    b.commit(3)
    assert b.meet(1, rank=0)
    assert [e.step for e in b.of_kind("fault_injected")] == [2]
    b = bench(spares=1, chaos="migrate rank=0 step=2").ready()
    b.commit(2)
    b.supervisor.ending.stop(signal.SIGTERM)
    assert b.meet(0, rank=0)
    assert [str(fault) for fault in b.job.unfired] == ["migrate rank=0 step=2"]


def test_a_slow_rank_that_makes_progress_is_left_alone(bench):
    b = bench(spares=1).ready()
    for step in range(1, 40):
        b.rank(0).progress["phase"] = Phase.WAITING
        b.rank(1).progress["phase"] = Phase.COMPUTING
        b.clock.advance(30)
        b.commit(step)
    assert not b.rank(1).signals
    assert b.job.incidents.total == 0


def test_kill_spare_by_the_plan_waits_until_there_is_one_and_hits_it(bench):
    b = bench(spares=1, chaos="kill_spare step=2")
    for rank in (0, 1):
        b.rank(rank).say(Hello(worker=rank, pid=1))
        b.rank(rank).say(Ready())
    b.commit(2)
    assert not b.engine.started[2].signals
    b.park()
    assert b.engine.started[2].signals[0] is signal.SIGKILL
    assert [e.fault for e in b.of_kind("fault_injected")] == ["kill_spare"]


def _random_faults(b, count):
    """Let the plan hit `count` times; the job is repaired after each."""
    step = 0
    while len(b.of_kind("fault_injected")) < count:
        b.step(5.0)
        for rank in range(4):
            for order in b.rank(rank).heard(Drain):
                b.rank(rank).say(Drained(step=step, generation=order.generation))
            b.rank(rank).stopped = signal.SIGSTOP in b.rank(rank).signals
        b.step(2.0)
        b.step(2.0)
        b.park()
        b.form(step)
        b.park()
        step += 1
        b.commit(step)
    return [(e.fault, e.rank, e.step) for e in b.of_kind("fault_injected")][:count]


def test_random_faults_follow_their_seed_and_the_job_survives_them(bench):
    plan = "random every=10s seed=7"
    runs = [_random_faults(bench(nproc=4, spares=2, chaos=plan).ready(), 30) for _ in range(2)]
    assert runs[0] == runs[1]
    assert {fault for fault, _rank, _step in runs[0]} == {"kill", "stop", "migrate", "kill_spare"}


def test_survivors_of_random_faults_lose_nothing(bench):
    b = bench(nproc=4, spares=2, chaos="random every=10s seed=1").ready()
    _random_faults(b, 60)
    assert b.job.membership.incarnation == 0
    assert all(incident.chaos and not incident.steps_lost for incident in b.of_kind("incident"))


def test_a_process_that_cannot_be_reaped_is_left_behind_and_its_rank_goes_on(bench):
    b = bench(spares=1).ready()
    stuck = b.rank(0)
    stuck.immortal = stuck.stopped = True
    b.step(1.0)
    b.step(1.5)
    assert stuck.signals == [signal.SIGKILL]
    assert b.job.membership.generation == 1
    b.step(6)
    assert (b.job.membership.generation, b.job.membership.newcomers) == (2, {0})
    b.form(0)
    b.commit(1)
    for rank in (0, 1):
        b.rank(rank).say(Done(step=1))
    b.step()
    for process in b.engine.started:
        if process is not stuck:
            process.end(code=0)
    b.step()
    assert b.supervisor.is_over
    assert b.supervisor.exit_code == 0
    stuck.immortal = False


def test_ps_lists_a_rank_once_while_a_successor_takes_over(bench):
    b = bench(spares=1).ready()
    b.rank(1).begin_to_die(signal.SIGKILL)
    b.step()

    def listed():
        return [(w["rank"], w["worker"]) for w in status(b.supervisor)["workers"]]

    assert 1 in b.job.workers  # its memory is still being freed
    assert listed() == [(0, 0), (1, 2)]
    b.engine.started[2].begin_to_die(signal.SIGKILL)
    b.step()
    told = status(b.supervisor)
    assert (told["lost_ranks"], listed()) == ([1], [(0, 0), (None, 3)])


def test_ps_tells_a_worker_that_gave_its_rank_away_from_a_spare(bench):
    b = bench(spares=1, chaos="migrate rank=0 step=2").ready()
    b.commit(2)
    b.meet(0, rank=0)
    b.drain(0)
    told = {w["worker"]: (w["rank"], w["leaving"]) for w in status(b.supervisor)["workers"]}
    assert told == {0: (None, True), 1: (1, False), 2: (0, False)}


def test_ranks_that_parted_are_told_so_at_once_and_nothing_else(bench):
    b = bench(spares=1).ready()
    b.commit(6)
    b.rank(0).progress["phase"] = Phase.DONE
    b.rank(0).say(Done(step=6))
    b.rank(1).progress["phase"] = Phase.WAITING
    b.rank(1).progress["section_mono_ns"] = 1
    b.step(59)
    assert not b.job.is_ending
    b.step(2)
    assert b.supervisor.exit_code == 1
    assert "rank 1 waits in step 6 for rank 0, whose script ended after 6 steps" in b.job.reason
    assert b.job.incidents.total == 0


def test_ranks_that_find_that_they_parted_end_the_job(bench):
    b = bench(spares=1).ready()
    b.commit(6)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.form(6, ranks=[0], error="ranks disagree about operation 3\nhint: the same", parted=True)
    assert b.supervisor.exit_code == 1
    assert b.job.reason == "ranks disagree about operation 3; hint: the same"
