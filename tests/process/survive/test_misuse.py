"""What TrainOnce refuses is no failure to recover from; what flaky code raises is."""

from pathlib import Path

import pytest

from trainonce.testing import run_job

MISUSE = Path(__file__).parent / "scripts" / "misuse.py"


@pytest.mark.parametrize(
    ("how", "error", "hint"),
    [
        ("mean outside", "StepError: run.mean was called outside a step", "@run.step"),
        ("changed outside", "StateError: protected parameter", "change parameters only inside"),
    ],
)
def test_a_misuse_in_training_ends_the_job_at_once_with_its_hint(tmp_path, how, error, hint):
    result = run_job(MISUSE, how, spares=1, home=tmp_path)
    assert (result.exit_code, result.leftovers) == (1, []), result.explain()
    (incident,) = result.incidents
    assert (incident.cause, incident.step, incident.served_by) == ("misuse", 4, "none")
    assert incident.detail.startswith(error)
    said = [line for line in result.stderr.splitlines() if line.startswith("trainonce: ")]
    assert hint in said[-3], result.stderr
    assert error in said[-1]


def test_a_flaky_exception_that_the_script_did_not_heed_is_survived(tmp_path, calm):
    result = run_job(
        MISUSE, "caught", "--once", tmp_path / "once", spares=1, home=tmp_path / "home"
    )
    result.assert_completed()
    (incident,) = result.incidents
    assert (incident.cause, incident.served_by) == ("exception", "rebuild")
    assert "StepError: a step raised ValueError" in incident.detail
    result.assert_same_state(calm("misuse.py", "caught", "--once", tmp_path / "once"))
