"""How jobs end: completed, interrupted, or for a bug; stepped on the bench."""

import signal

from trainonce.controller.launch import last_line
from trainonce.wire.messages import (
    Checkpoint,
    Done,
    Exit,
    Failed,
    FaultFiring,
    Generation,
    Hello,
    PeerLost,
    Report,
)


def test_an_unexpected_exit_0_is_a_failure_to_recover_from(bench):
    b = bench(spares=1).ready()
    b.rank(0).end(code=0)
    b.step()
    assert b.job.membership.newcomers == {0}
    b.form(0)
    b.commit(1)
    assert "ended with exit code 0 before the job was done" in b.lines[-1]


def _fail(b, rank, text="flaky"):
    b.rank(rank).say(
        Failed(step=3, in_section=True, error_type="ValueError", error=text, traceback=f"TB {text}")
    )
    b.step()


def test_an_exception_is_survived_once(bench):
    b = bench(spares=1).ready()
    b.commit(3)
    _fail(b, 1)
    b.form(3)
    b.commit(4)
    (incident,) = b.of_kind("incident")
    assert (incident.cause, incident.detail) == ("exception", "ValueError: flaky")
    assert not b.job.is_ending


def test_the_same_exception_in_the_same_section_twice_ends_the_job_with_its_traceback(bench):
    b = bench(spares=2).ready()
    b.commit(3)
    _fail(b, 1)
    b.commit(3)
    b.form(3)
    _fail(b, 1)
    assert b.supervisor.is_over
    assert b.supervisor.exit_code == 1
    assert "TB flaky" in b.lines
    assert all(process.reaped for process in b.engine.started)


def test_a_long_exception_is_told_in_one_line_and_kept_whole(bench):
    b = bench(spares=1).ready()
    b.commit(3)
    _fail(b, 1, "size mismatch\nfor layer 1\nfor layer 2")
    b.form(3)
    b.commit(4)
    (incident,) = b.of_kind("incident")
    assert incident.detail.count("\n") == 2
    assert "raised ValueError: size mismatch at step 3; a spare took its place" in b.lines[-1]


def test_the_same_exception_from_every_rank_ends_the_job(bench):
    b = bench(spares=2).ready()
    b.commit(3)
    _fail(b, 1)
    _fail(b, 0)
    assert b.supervisor.exit_code == 1
    assert "every rank" in b.job.reason


def test_kills_from_outside_end_the_job_only_after_several_at_the_same_place(bench):
    b = bench(spares=1).ready()
    for _ in range(4):
        b.rank(1).end(signum=signal.SIGKILL)
        b.step()
        b.park()
        b.form(0)
        b.park()
    assert not b.job.is_ending
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert b.supervisor.exit_code == 3


def test_a_fault_of_the_plan_fires_once_and_is_no_bug(bench):
    b = bench(spares=2, chaos="kill rank=1 step=3; raise rank=1 step=3")
    b.engine.started[1].say(Hello(worker=1, pid=1))
    b.step()
    assert [f["index"] for f in b.engine.started[1].heard(Generation)[0].faults] == [0, 1]
    b.ready()
    b.commit(3)
    b.rank(1).say(FaultFiring(index=0, step=3, point="begin"))
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert [f["index"] for f in b.rank(1).heard(Generation)[0].faults] == [1]
    b.form(3)
    b.commit(4)
    assert b.of_kind("fault_injected")[0].fault == "kill"
    assert b.of_kind("incident")[0].chaos


def test_a_kill_of_the_plan_is_not_the_kernels_whoever_else_lacks_memory(bench, monkeypatch):
    monkeypatch.setattr("trainonce.controller.oom.OomCounter.has_grown", lambda _: True)
    b = bench(spares=2, chaos="kill rank=1 step=3").ready()
    b.commit(3)
    b.rank(1).say(FaultFiring(index=0, step=3, point="begin"))
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.form(3)
    b.commit(4)
    b.rank(0).end(signum=signal.SIGKILL)
    b.step()
    b.form(4)
    b.commit(5)
    assert [incident.cause for incident in b.of_kind("incident")] == ["signal", "oom"]


def test_planned_faults_that_did_not_fire_are_told_at_the_end(bench):
    plan = "reset step=1; kill rank=1 step=500; migrate rank=0 step=70; random every=9s"
    b = bench(spares=1, chaos=plan).ready()
    b.commit(1)
    b.meet(0, rank=0)
    b.form(1)
    b.commit(2)
    for rank in (0, 1):
        b.rank(rank).say(Done(step=2))
    b.step()
    missed = '"kill rank=1 step=500 point=begin", "migrate rank=0 step=70", "random every=9s"'
    assert last_line(b.job, 0).endswith(
        f"after 2 steps, 1 incident, 3 of 4 faults did not fire ({missed}), exit code 0"
    )
    for process in b.engine.started:
        process.end(code=0)
    b.step()
    b.supervisor.close()
    (ended,) = b.of_kind("job_ended")
    assert [f'"{fault}"' for fault in ended.unfired] == missed.split(", ")


def test_steps_lost_by_several_failures_together_are_counted_once(bench):
    b = bench().ready()
    b.commit(7)
    b.rank(0).end(signum=signal.SIGKILL)
    b.step()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.ready()
    b.commit(1)
    assert [incident.steps_lost for incident in b.of_kind("incident")] == [3, 4]


def test_the_job_ends_when_every_rank_is_done(bench):
    b = bench(spares=1).ready()
    b.rank(0).say(Done(step=9))
    b.step()
    assert not b.job.is_ending
    b.rank(1).say(Done(step=9))
    b.step()
    for process in b.engine.started:
        assert process.heard(Exit)
        process.end(code=0)
    b.step()
    assert b.supervisor.exit_code == 0
    b.supervisor.close()
    assert b.of_kind("job_ended")[0].outcome == "completed"
    assert b.of_kind("job_ended")[0].steps == 9


def test_a_death_after_one_rank_is_done_is_rebuilt_from_the_rank_that_lingers(bench):
    b = bench(spares=1).ready()
    b.rank(0).say(Done(step=9))
    b.step()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    assert b.rank(0).heard(Generation)[0].newcomers == [1]


def test_a_worker_that_will_not_leave_is_killed(bench):
    b = bench(nproc=1).ready()
    b.rank(0).say(Done(step=9))
    b.step()
    b.step(31)
    assert b.engine.started[0].signals == [signal.SIGKILL]
    assert b.supervisor.exit_code == 0


def test_sigterm_asks_for_a_checkpoint_and_reports_143(bench):
    b = bench(spares=1).ready()
    b.supervisor.ending.stop(signal.SIGTERM)
    for rank in (0, 1):
        assert b.rank(rank).heard(Checkpoint) == [Checkpoint(reason="signal", stop=True)]
    assert b.engine.started[2].heard(Exit)
    saved = {"kind": "checkpoint_saved", "path": "p", "step": 1, "size_bytes": 1,
             "blocked_s": 0.0, "write_s": 0.0, "reason": "signal"}  # fmt: skip
    b.rank(0).say(Report(event=saved))
    for process in b.engine.started:
        process.end(code=0)
    b.step()
    assert b.supervisor.exit_code == 143
    assert b.job.reason == "SIGTERM; a checkpoint was written"


def test_workers_that_outlast_the_grace_are_killed(bench):
    b = bench(grace_s=10.0).ready()
    b.supervisor.ending.stop(signal.SIGTERM)
    b.step(9)
    assert not b.rank(0).signals
    b.step(2)
    assert b.engine.started[0].signals == [signal.SIGKILL]
    assert b.supervisor.exit_code == 143


def test_a_rank_that_is_being_replaced_is_still_replaced_for_the_last_checkpoint(bench):
    b = bench().ready()
    b.rank(1).end(signum=signal.SIGKILL)
    b.step()
    b.supervisor.ending.stop(signal.SIGTERM)
    newcomer = b.engine.started[2]
    newcomer.say(Hello(worker=2, pid=5))
    b.step()
    told = newcomer.heard()
    assert [m.newcomers for m in told if isinstance(m, Generation)] == [[1]]
    assert told[-1] == Checkpoint(reason="signal", stop=True)
    b.form(0)
    for process in (b.rank(0), newcomer):
        process.end(code=0)
    b.step()
    assert b.supervisor.exit_code == 143


def test_a_second_interrupt_ends_at_once(bench):
    b = bench().ready()
    b.supervisor.ending.stop(signal.SIGINT)
    b.supervisor.ending.stop(signal.SIGINT)
    b.step()
    assert b.supervisor.is_over
    assert b.supervisor.exit_code == 130


def test_a_sigterm_sent_to_the_process_and_its_group_counts_once(bench):
    b = bench().ready()
    b.supervisor.ending.stop(signal.SIGTERM)
    b.supervisor.ending.stop(signal.SIGTERM)
    b.step()
    assert not b.supervisor.is_over
    b.clock.advance(1.0)
    b.supervisor.ending.stop(signal.SIGTERM)
    b.step()
    assert b.supervisor.is_over
    assert b.supervisor.exit_code == 143


def test_a_plain_script_that_fails_ends_the_job_as_under_torchrun(bench):
    b = bench()
    b.rank(1).end(code=7)
    b.step()
    assert b.supervisor.exit_code == 1
    assert sum("does not call trainonce.init()" in line for line in b.lines) == 1


def test_a_plain_script_is_restarted_up_to_max_restarts(bench):
    b = bench(max_restarts=1)
    b.rank(1).end(code=7)
    b.step()
    assert b.job.membership.workers == (2, 3)
    env = b.engine.started[2].spec.env
    assert (env["TORCHELASTIC_RESTART_COUNT"], env["TORCHELASTIC_MAX_RESTARTS"]) == ("1", "1")
    assert env["MASTER_PORT"] == "1235"
    for rank in (0, 1):
        b.rank(rank).end(code=0)
    b.step()
    assert b.supervisor.exit_code == 0
    # Nobody knows what it lost, so it does not count as resolved.
    (incident,) = b.of_kind("incident")
    assert (incident.served_by, incident.supported) == ("restart", False)


def test_logs_of_workers_are_where_torchrun_puts_them(bench, tmp_path):
    b = bench(redirects=(3, 3), log_dir=tmp_path)
    assert str(b.engine.started[1].spec.stdout).endswith("j/attempt_0/1/stdout.log")


def test_a_rank_that_is_late_in_the_set_up_still_learns_where_to_resume(bench, tmp_path):
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    b = bench()
    b.engine.started[0].say(Hello(worker=0, pid=1))
    b.step()
    b.engine.started[0].say(PeerLost(generation=1, error="reset"))
    b.step()
    b.step(0.25)
    assert b.job.membership.generation == 2
    b.engine.started[1].say(Hello(worker=1, pid=1))
    b.step()
    told = b.engine.started[1].heard(Generation)[-1]
    assert (told.generation, told.resume) == (2, str(tmp_path / "checkpoints"))
