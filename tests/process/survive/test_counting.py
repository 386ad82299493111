"""What a script keeps in variables of its own starts anew in a newcomer: it is told so."""

from pathlib import Path

from trainonce.testing import run_job

SCRIPTS = Path(__file__).parent / "scripts"


def test_a_script_that_enumerates_its_batches_is_warned(tmp_path):
    told = "enumerate(run.batches(...)) counts from 0 again"
    counting = run_job(SCRIPTS / "enumerated.py", "count", home=tmp_path / "counting")
    counting.assert_completed()
    assert counting.stderr.count(told) == 1
    plain = run_job(SCRIPTS / "enumerated.py", home=tmp_path / "plain")
    plain.assert_completed()
    assert told not in plain.stderr


def test_a_script_that_needs_what_a_completed_loop_left_behind_is_told_how(tmp_path):
    # Four training steps and the evaluation: then the loop of this epoch is completed.
    result = run_job(
        SCRIPTS / "after_the_loop.py", spares=1, chaos="kill rank=1 step=5 point=commit",
        home=tmp_path,
    )  # fmt: skip
    assert result.exit_code == 1
    assert result.stderr.count("what code after them needs (a last loss, say) belongs") == 1
