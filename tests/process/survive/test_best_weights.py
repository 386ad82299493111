"""Weights that a script keeps in variables are there whoever dies."""

from pathlib import Path

import pytest

from trainonce.events import CheckpointSaved
from trainonce.testing import JobResult, run_job

SCRIPT = Path(__file__).parent / "scripts" / "best_weights.py"


def assert_same(result: JobResult, calm: JobResult) -> None:
    result.assert_completed()
    result.assert_same_state(calm)
    assert result.values("kept") == calm.values("kept"), result.explain()


@pytest.mark.parametrize("loop", ["epochs", "range"])
@pytest.mark.parametrize(
    "chaos",
    [
        # The weights are new before this step, ...
        "kill rank=1 step=4 point=updated",
        # ... and are older here, where another newcomer has them from the first.
        "kill rank=0 step=9 point=backward; kill rank=0 step=18 point=updated; kill rank=1 step=31",
        "kill rank=1 step=32; kill rank=0 step=33 point=commit",
        "migrate rank=1 step=13; migrate rank=0 step=20",
    ],
    ids=["new", "again", "last", "moves"],
)
def test_a_newcomer_has_the_best_weights(calm, tmp_path, loop, chaos):
    result = run_job(SCRIPT, "--loop", loop, spares=1, chaos=chaos, home=tmp_path)
    assert len(result.faults) == chaos.count(";") + 1, result.explain()
    result.assert_nothing_lost()
    assert "cannot come along" not in result.stderr
    assert_same(result, calm("best_weights.py", "--loop", loop))


def test_the_best_weights_come_along_with_a_checkpoint(calm, tmp_path):
    # Without a spare, so that nobody takes the first over before the second dies.
    result = run_job(
        SCRIPT, "--checkpoint-every", 0.001, home=tmp_path,
        chaos="kill rank=0 step=30 point=updated; kill rank=1 step=30 point=updated",
    )  # fmt: skip
    result.assert_fired("kill", times=2, served_by="checkpoint")
    saved = [each.step for each in result.events if isinstance(each, CheckpointSaved)]
    assert any(4 < step < 30 for step in saved), saved
    assert_same(result, calm("best_weights.py"))


@pytest.mark.parametrize("moment", ["ahead", "late"])
def test_what_a_step_itself_keeps_is_not_that_of_before(calm, tmp_path, moment):
    script = SCRIPT.with_name("large_in_step.py")
    chaos = "kill rank=1 step=10 point=updated"  # it has let the others commit
    result = run_job(script, "--moment", moment, spares=1, chaos=chaos, home=tmp_path)
    result.assert_fired("kill")
    assert_same(result, calm("large_in_step.py", "--moment", moment))


def test_weights_beyond_the_limit_are_named(tmp_path):
    env = {"TRAINONCE_LARGE_VARIABLES_MB": "0.001"}
    chaos = "kill rank=1 step=5 point=forward"
    result = run_job(SCRIPT, spares=1, chaos=chaos, env=env, home=tmp_path)
    result.assert_fired("kill")
    assert "cannot come along when a rank is taken over: best" in result.stderr
    assert "run.state" in result.stderr
