"""Lost devices on the bench: who waits, who becomes a guest, who goes home; job ends in order."""

import signal

import pytest

from trainonce.controller.drain import Drain as DrainRequest
from trainonce.controller.policy import WhenNoSpare
from trainonce.wire.messages import (
    Checkpoint,
    Exit,
    Failed,
    FaultFiring,
    Generation,
    Hello,
    Report,
)

LOSE_1 = "lose rank=1 step=0"


def lose(bench, rank, index=0):
    """Have a rank meet its end by fault `index` of the plan."""
    process = bench.rank(rank)
    process.say(FaultFiring(index=index, step=bench.job.step, point="begin"))
    process.end(signum=signal.SIGKILL)
    bench.step()


def slot(process):
    return int(process.spec.env["TRAINONCE_SLOT"])


def recover(bench, step, **fields):
    """Let all ranks join the present generation and commit `step` + 1."""
    bench.form(step, **fields)
    bench.commit(step + 1)


def go_home(bench, rank):
    """Let a rank that is told to drain leave for the worker that is ready for it."""
    old = bench.drain(rank)
    recover(bench, bench.job.step)
    old.end(code=0)
    bench.step()


def test_a_process_that_dies_leaves_its_slot_to_the_next(bench):
    b = bench(nproc=3, when_no_spare=WhenNoSpare.WAIT).ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert [slot(p) for p in b.engine.started] == [0, 1, 2, 1]
    b.park()
    recover(b, 0)
    (incident,) = b.of_kind("incident")
    assert incident.served_by == "rebuild"
    assert not b.of_kind("guests_changed")


def test_spares_have_slots_of_their_own_and_new_ones_get_those_that_are_free(bench):
    b = bench(spares=1).ready()
    assert [slot(p) for p in b.engine.started] == [0, 1, 2]
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    recover(b, 0)
    b.step(1.0)
    assert slot(b.engine.started[3]) == 1


def test_wait_holds_the_job_until_the_slot_is_back(bench):
    b = bench(chaos=LOSE_1, when_no_spare=WhenNoSpare.WAIT).ready()
    lose(b, 1)
    b.step(700)
    assert len(b.engine.started) == 2
    assert b.job.short == 1
    assert sum("waiting until one is free again" in line for line in b.lines) == 1
    b.supervisor.capacity.restore()
    b.step(0.3)
    assert slot(b.engine.started[2]) == 1
    b.park()
    recover(b, 0)
    (incident,) = b.of_kind("incident")
    assert incident.served_by == "rebuild"
    assert incident.waited_for_spare_s >= 700
    assert b.job.short == 0


def test_a_slot_that_is_lost_for_a_time_comes_back_by_itself(bench):
    b = bench(chaos=f"{LOSE_1} for=5s", when_no_spare=WhenNoSpare.WAIT).ready()
    lose(b, 1)
    b.step(4.5)
    assert len(b.engine.started) == 2
    b.step(0.6)
    b.step(0.3)
    assert len(b.engine.started) == 3


def test_spread_puts_several_lost_ranks_on_different_devices(bench):
    b = bench(nproc=4, chaos="lose rank=1 step=0; lose rank=2 step=0").ready()
    lose(b, 1)
    lose(b, 2, index=1)
    assert [slot(p) for p in b.engine.started[4:]] == [0, 3]
    b.park()
    recover(b, 0)
    (told,) = b.of_kind("guests_changed")
    assert (told.ranks, told.hosts) == ([1, 2], [0, 3])
    b.step(0.3)
    assert [i.served_by for i in b.of_kind("incident")] == ["guest", "guest"]
    assert any("starting a guest on another's" in line for line in b.lines)
    assert any("a guest on the device of another rank took its place" in line for line in b.lines)
    assert b.supervisor.watch.snapshot.guests == 2


def test_guests_go_home_one_by_one_without_loss(bench):
    b = bench(nproc=4, chaos="lose rank=1 step=0; lose rank=2 step=0").ready()
    lose(b, 1)
    lose(b, 2, index=1)
    b.park()
    recover(b, 0)
    b.step(10)
    b.supervisor.capacity.restore()
    for rank in (1, 2):
        b.step(0.3)
        b.park()
        go_home(b, rank)
    b.step(0.3)
    moves = [i for i in b.of_kind("incident") if i.planned]
    assert [(i.ranks, i.served_by, i.detail) for i in moves] == [
        ([1], "migration", "a device is free again"),
        ([2], "migration", "a device is free again"),
    ]
    assert [e.ranks for e in b.of_kind("guests_changed")] == [[1, 2], [2], []]
    assert sorted(b.job.holder(rank).slot for rank in range(4)) == [0, 1, 2, 3]
    assert any("no rank shares a device any more" in line for line in b.lines)


def test_a_spare_comes_before_a_guest_and_a_guest_goes_home_to_a_spare(bench):
    b = bench(chaos="lose rank=1 step=0; lose rank=0 step=1", spares=1).ready()
    lose(b, 1)
    recover(b, 0)
    assert b.of_kind("incident")[0].served_by == "rebuild"
    b.step(1.0)
    assert len(b.engine.started) == 3
    assert any("1 of 1 spares cannot be kept" in line for line in b.lines)
    lose(b, 0, index=1)
    assert slot(b.engine.started[3]) == 2
    b.park()
    recover(b, 1)
    assert b.of_kind("incident")[1].served_by == "guest"
    b.supervisor.capacity.restore()
    b.step(1.5)
    b.park()
    go_home(b, 0)
    b.step(1.5)
    assert b.job.guests() == {}
    assert len(b.job.spares()) == 1
    assert len({handle.slot for handle in b.job.workers.values()}) == 3


def test_a_guest_that_is_killed_is_served_again(bench):
    b = bench(nproc=3, chaos=LOSE_1).ready()
    lose(b, 1)
    b.park()
    recover(b, 0)
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert slot(b.engine.started[4]) == 0
    b.park()
    recover(b, 1)
    assert [i.served_by for i in b.of_kind("incident")] == ["guest", "guest"]


def test_a_spare_that_was_started_as_a_guest_leaves_when_it_is_not_needed(bench):
    b = bench(nproc=3, chaos=LOSE_1).ready()
    lose(b, 1)
    b.job.slots.lost.clear()
    beside = b.engine.started[3]
    b.job.start_worker(1)
    b.engine.started[4].say(Hello(worker=4, pid=5))
    b.step()
    assert b.job.membership.workers == (0, 4, 2)
    recover(b, 0)
    b.step(0.3)
    assert beside.heard(Exit)


def test_a_guest_that_does_not_fit_ends_the_sharing_and_not_the_job(bench):
    b = bench(nproc=3, chaos=LOSE_1).ready()
    lose(b, 1)
    b.park()
    recover(b, 0)
    host = b.rank(0)
    host.say(Failed(step=1, in_section=True, error_type="OutOfMemoryError",
                    error="CUDA out of memory", traceback=""))  # fmt: skip
    host.end(code=1)
    b.step()
    b.step(0.1)
    assert b.engine.started[3].signals == [signal.SIGKILL]
    assert not b.job.is_ending
    assert slot(b.engine.started[4]) == 0
    assert b.job.short == 1
    assert any("does not hold two workers" in line for line in b.lines)
    b.job.slots.lost.clear()
    b.step(0.3)
    assert slot(b.engine.started[5]) == 1


def test_checkpoint_finishes_the_step_by_a_guest_and_ends_with_a_code_of_its_own(bench):
    b = bench(chaos=LOSE_1, when_no_spare=WhenNoSpare.CHECKPOINT).ready()
    lose(b, 1)
    guest = b.engine.started[2]
    assert slot(guest) == 0
    assert not b.job.stopping
    guest.say(Hello(worker=2, pid=5))
    b.step()
    for process in (b.rank(0), guest):
        assert process.heard(Checkpoint) == [Checkpoint(reason="signal", stop=True)]
    recover(b, 0)
    saved = {"kind": "checkpoint_saved", "path": "p", "step": 1, "size_bytes": 1,
             "blocked_s": 0.0, "write_s": 0.0, "reason": "signal"}  # fmt: skip
    b.rank(0).say(Report(event=saved))
    for process in (b.rank(0), guest):
        process.end(code=0)
    b.step()
    assert b.supervisor.exit_code == 4
    assert b.job.outcome == "interrupted"
    assert b.job.reason == "there is no device for every rank; a checkpoint was written"
    assert any("--job-id j" in line for line in b.lines)


def test_sigterm_while_the_job_waits_still_ends_it_with_a_checkpoint(bench):
    b = bench(chaos=LOSE_1, when_no_spare=WhenNoSpare.WAIT).ready()
    lose(b, 1)
    b.step(5)
    b.supervisor.ending.stop(signal.SIGTERM)
    b.step(0.3)
    guest = b.engine.started[2]
    guest.say(Hello(worker=2, pid=5))
    b.step()
    assert guest.heard()[-1] == Checkpoint(reason="signal", stop=True)
    for process in (b.rank(0), guest):
        process.end(code=0)
    b.step()
    assert b.supervisor.exit_code == 143


@pytest.mark.parametrize(
    ("policy", "placed"),
    [(WhenNoSpare.SPREAD, [0, 0]), (WhenNoSpare.WAIT, []), (WhenNoSpare.CHECKPOINT, [])],
)
def test_a_start_of_all_ranks_with_a_lost_device(bench, policy, placed):
    b = bench(chaos=LOSE_1, when_no_spare=policy)
    for worker in (0, 1):
        b.engine.started[worker].say(Hello(worker=worker, pid=1))
    b.step()
    lose(b, 1)  # before its set-up is done: all ranks start again
    b.step(0.5)
    assert [slot(p) for p in b.engine.started[2:]] == placed
    if policy is WhenNoSpare.CHECKPOINT:
        assert b.supervisor.exit_code == 4
    if policy is WhenNoSpare.WAIT:
        assert b.job.short == 1
        b.supervisor.capacity.restore()
        b.step(0.3)
        assert [slot(p) for p in b.engine.started[2:]] == [0, 1]
        assert b.job.membership.incarnation == 1


def test_spares_make_room_for_ranks_when_all_start_again(bench):
    b = bench(chaos="lose rank=1 step=0; lose rank=0 step=0", spares=1).ready()
    for rank, index in ((0, 1), (1, 0)):
        process = b.rank(rank)
        process.say(FaultFiring(index=index, step=0, point="begin"))
        process.end(signum=signal.SIGKILL)
    b.step()
    assert b.engine.started[2].signals == [signal.SIGKILL]
    assert b.job.restarting
    b.supervisor.capacity.restore()
    b.step(0.3)
    assert [slot(p) for p in b.engine.started[3:5]] == [0, 1]


def test_a_drained_device_is_given_back_by_undo(bench):
    b = bench(when_no_spare=WhenNoSpare.WAIT).ready()
    answers = []

    def drain():
        return DrainRequest(b.supervisor, "here", "slot1")

    drain().run(lambda ok, text: answers.append((ok, text)))
    ((ok, text),) = answers
    assert not ok
    assert text.endswith("slot1 of here: rank 1 stays: no device is free for it")
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.step(5)
    assert len(b.engine.started) == 2
    drain().undo(lambda ok, text: answers.append((ok, text)))
    b.step(0.3)
    assert slot(b.engine.started[2]) == 1
    drain().undo(lambda ok, text: answers.append((ok, text)))
    assert [ok for ok, _text in answers] == [False, True, False]


def test_a_lost_rank_of_a_lost_device_hears_which_faults_are_left(bench):
    b = bench(nproc=3, chaos=f"{LOSE_1}; kill rank=1 step=5").ready()
    lose(b, 1)
    b.park()
    (told,) = b.engine.started[3].heard(Generation)
    assert [fault["action"] for fault in told.faults] == ["kill"]
