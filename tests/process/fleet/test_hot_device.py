"""A warning moves the rank before its device dies; without one the death is survived."""

import signal
from pathlib import Path

import pytest

from trainonce.testing.jobs import run_job

SCRIPT = Path(__file__).parent / "hot_device.py"
DIES_AT, STEPS = 600, 640


@pytest.fixture(scope="module")
def healthy():
    """The same job on a device that never dies."""
    result = run_job(SCRIPT, "", -1, STEPS)
    result.assert_completed()
    return result


def test_rank_on_a_device_that_grows_hot_is_moved_before_it_dies(healthy, tmp_path):
    ramp = tmp_path / "ramp.jsonl"
    job = run_job(
        SCRIPT, ramp, DIES_AT, STEPS, spares=1,
        options=("--health", f"file:{ramp}", "--health-every-s", "0.05"),
    )  # fmt: skip
    job.assert_completed()
    (incident,) = job.incidents
    assert (incident.cause, incident.detected_by, incident.ranks) == ("migration", "health", [1])
    assert incident.planned
    assert "shutdown at 92 °C is near" in incident.detail
    assert incident.step < DIES_AT
    assert incident.micro_batches_recomputed == 0
    job.assert_nothing_lost()
    changed = [event for event in job.events if event.kind == "health_changed"]
    assert ("worker1", "migrate", [1]) in [(e.device, e.action, e.ranks) for e in changed]
    job.assert_same_state(healthy)
    (lever,) = [event for event in healthy.events if event.kind == "lever_applied"]
    assert (lever.lever, lever.expected_share, lever.basis) == (
        "precision",
        0.25,
        "a bench of ours",
    )


@pytest.mark.slow
def test_without_a_warning_the_death_is_survived_by_a_rebuild(healthy, tmp_path):
    job = run_job(
        SCRIPT,
        "",
        DIES_AT,
        STEPS,
        spares=1,
        options=("--health", "dcgm:http://127.0.0.1:1/metrics,host"),
    )
    job.assert_completed()
    (incident,) = job.incidents
    assert (incident.cause, incident.detail) == ("signal", signal.Signals.SIGKILL.name)
    assert (incident.served_by, incident.step, incident.planned) == ("rebuild", DIES_AT, False)
    job.assert_nothing_lost()
    job.assert_same_state(healthy)
    # A source that was asked for and does not answer is told, and the job goes on.
    assert "note: http://127.0.0.1:1/metrics is not read" in job.stderr
