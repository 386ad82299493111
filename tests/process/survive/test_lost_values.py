"""What a step returned may die with its process: the newcomer's script goes on all the same."""

from pathlib import Path

from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "returned.py"


def test_a_value_lost_in_the_very_first_step_has_the_form_that_other_ranks_know(tmp_path):
    chaos = "kill rank=1 step=0 point=updated; kill rank=0 step=3 point=updated"
    result = run_job(SCRIPT, spares=1, chaos=chaos, home=tmp_path)
    result.assert_completed()
    assert len(result.faults) == 2, result.explain()
    result.assert_nothing_lost()
    assert sorted(line for line in result.stdout.splitlines() if "LOST" in line) == [
        "LOST at 1",
        "LOST at 4",
    ]
