"""A device is lost and there is no spare: wait for it, share others', or end with a checkpoint."""

import functools
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from trainonce.controller import control_socket
from trainonce.errors import TrainOnceError
from trainonce.events import CheckpointSaved
from trainonce.testing import run_job

SCRIPTS = Path(__file__).parent / "scripts"
SPREAD = ("--when-no-spare", "spread")
WAIT = ("--when-no-spare", "wait")
CHECKPOINT = ("--when-no-spare", "checkpoint")


def of_kind(result, kind):
    return [event for event in result.events if event.kind == kind]


def test_lost_ranks_are_guests_until_their_devices_are_back_bit_for_bit(shaken):
    """Two devices are lost, a guest is killed, then the devices come back."""
    result = shaken(
        "crowded.py", "--until-apart", 9, world=3, spares=0, options=SPREAD,
        faults=["lose rank=1 step=2 point=backward", "lose rank=2 step=4 point=collective",
                "kill rank=1 step=6 point=update", "restore step=8"],
    )  # fmt: skip
    failures = [i for i in result.incidents if not i.planned]
    assert [(i.ranks, i.cause, i.served_by) for i in failures] == [
        ([1], "signal", "guest"),
        ([2], "signal", "guest"),
        ([1], "signal", "guest"),
    ]
    moves = [i for i in result.incidents if i.planned]
    assert sorted((i.ranks, i.served_by, i.detected_by) for i in moves) == [
        ([1], "migration", "capacity"),
        ([2], "migration", "capacity"),
    ]
    assert all(i.digest_before == i.digest_after != "" for i in result.incidents)
    changes = of_kind(result, "guests_changed")
    assert changes[-1].ranks == []
    assert {1, 2} == {rank for event in changes for rank in event.ranks}
    assert "no rank shares a device any more" in result.stderr


def test_the_job_waits_until_the_device_is_back(shaken):
    result = shaken(
        "basic.py", faults=["lose rank=1 step=4 point=backward for=1s"], spares=0, options=WAIT
    )
    (incident,) = result.incidents
    assert incident.served_by == "rebuild"
    assert incident.waited_for_spare_s >= 1
    assert "no device is left for 1 rank(s): waiting until one is free again" in result.stderr
    assert not of_kind(result, "guests_changed")


@pytest.mark.slow
def test_the_job_ends_with_a_checkpoint_and_goes_on_from_it(calm, tmp_path):
    left = run_job(SCRIPTS / "crowded.py", "--steps", 600, home=tmp_path, options=CHECKPOINT,
                   job="left", chaos="lose rank=0 step=5 point=backward")  # fmt: skip
    assert left.exit_code == 4, left.explain()
    assert not left.leftovers
    assert "`trainonce run --job-id left …` goes on" in left.stderr
    assert "a checkpoint was written" in left.stderr
    resumed = run_job(
        SCRIPTS / "crowded.py", "--steps", 600, home=tmp_path, options=CHECKPOINT, job="left"
    )
    resumed.assert_completed()
    assert "resumed from the checkpoint of step" in resumed.stderr
    resumed.assert_same_state(calm("crowded.py", "--steps", 600))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["forward", "backward", "collective", "update", "commit"])
def test_a_device_lost_at_any_point_gives_a_guest_bit_for_bit(shaken, rank, point):
    result = shaken("basic.py", faults=[f"lose rank={rank} step=3 point={point}"], spares=0)
    result.assert_fired("lose", cause="signal", detail="SIGKILL", served_by="guest")


@pytest.mark.slow
def test_the_spare_serves_first_and_then_a_guest(shaken):
    result = shaken(
        "crowded.py", "--until-apart", 9, world=2, spares=1,
        faults=["lose rank=1 step=2 point=backward", "lose rank=0 step=5 point=update",
                "restore step=7"],
    )  # fmt: skip
    served = [i.served_by for i in result.incidents if not i.planned]
    assert served == ["rebuild", "guest"]
    assert of_kind(result, "guests_changed")[-1].ranks == []


@pytest.mark.slow
def test_two_ranks_of_three_lost_in_one_step_share_the_device_of_the_third(shaken):
    result = shaken(
        "basic.py", world=3, spares=0,
        faults=["lose rank=1 step=3 point=backward", "lose rank=2 step=3 point=backward"],
    )  # fmt: skip
    assert {i.served_by for i in result.incidents} == {"guest"}
    assert of_kind(result, "guests_changed")[-1].hosts == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [SPREAD, WAIT], ids=["spread", "wait"])
def test_all_devices_lost_wait_and_all_ranks_start_again(calm, tmp_path, options):
    """No living copy: a restart of all ranks, which also needs room, and counts as one."""
    result = run_job(
        SCRIPTS / "basic.py", home=tmp_path, options=(*options, "--max-restarts", "1"),
        chaos="lose rank=0 step=5 point=begin for=2s; lose rank=1 step=5 point=begin for=2s",
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("lose", times=2, cause="signal", served_by="restart")
    assert "devices, to start all ranks again" in result.stderr
    result.assert_same_state(calm("basic.py"))


@pytest.mark.slow
def test_a_waiting_job_is_listed_and_ends_on_sigterm_with_a_checkpoint(calm, tmp_path):
    seen = {}

    def watch(process):
        while process.poll() is None:
            try:
                status = control_socket.request("stuck", op="status", timeout_s=10)
            except TrainOnceError:
                continue  # not yet, or no longer
            if status["short"]:
                seen.update(status)
                process.send_signal(signal.SIGTERM)
                return

    run = functools.partial(
        run_job, SCRIPTS / "basic.py", "--steps", 600, home=tmp_path, options=WAIT, job="stuck"
    )
    result = run(watch=watch, chaos="lose rank=1 step=5 point=backward")
    assert (seen["lost_ranks"], seen["lost_slots"], seen["short"]) == ([1], [1], 1)
    assert result.exit_code == 143, result.explain()
    assert of_kind(result, CheckpointSaved.kind)
    resumed = run()
    resumed.assert_completed()
    resumed.assert_same_state(calm("basic.py", "--steps", 600))


@pytest.mark.slow
def test_a_device_that_health_finds_unfit_is_used_again_once_it_is_fit(calm, tmp_path):
    """Slot 1 grows hot, its process dies, a guest serves; then it cools down."""
    signals, cold = tmp_path / "signals.jsonl", tmp_path / "cold"

    def read(first_s, temperatures):
        with signals.open("a") as file:
            for number, celsius in enumerate(temperatures):
                reading = {
                    "mono_s": first_s + 10.0 * number, "host": socket.gethostname(),
                    "device": "slot1", "temperature_c": celsius, "slowdown_c": 87,
                    "shutdown_c": 92,
                }  # fmt: skip
                file.write(json.dumps(reading) + "\n")

    def kill_and_cool_down_under_the_guest(process):
        victim = None
        while process.poll() is None:
            try:
                status = control_socket.request("hot", op="status", timeout_s=10)
            except TrainOnceError:
                continue  # not yet, or no longer
            workers = status["workers"]
            if victim is None and status["step"] > 5 and status["lost_slots"] == [1]:
                (victim,) = (worker["pid"] for worker in workers if worker["rank"] == 1)
                os.kill(victim, signal.SIGKILL)
            if any(worker["guest_of"] is not None for worker in workers):
                read(800.0, [50.0] * 100)
                cold.touch()
                return

    read(0.0, [50 + 0.5 * number for number in range(80)])
    result = run_job(
        SCRIPTS / "crowded.py", "--until-apart", 8, "--until", cold, home=tmp_path, job="hot",
        options=("--health", f"file:{signals}", "--health-every-s", "0.05"),
        watch=kill_and_cool_down_under_the_guest,
    )  # fmt: skip
    result.assert_completed()
    result.assert_same_state(calm("crowded.py"))
    died, moved = result.incidents
    assert (died.cause, died.served_by) == ("signal", "guest")
    assert (moved.detected_by, moved.served_by) == ("capacity", "migration")
