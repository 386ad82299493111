"""What a step returned may die with its process: the newcomer's script goes on all the same."""

from pathlib import Path

from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "returned.py"


def test_a_value_that_is_lost_has_its_form_and_none_is_lost_in_a_first_execution(tmp_path):
    """After the update of a first execution all ranks meet once more: its share is executed."""
    chaos = "kill rank=1 step=0 point=updated; kill rank=0 step=3 point=updated"
    result = run_job(
        SCRIPT, spares=1, chaos=chaos, env={"TRAINONCE_EXACT_RETURNS_MB": "0"}, home=tmp_path
    )
    result.assert_completed()
    assert len(result.faults) == 2, result.explain()
    result.assert_nothing_lost()
    assert [line for line in result.stdout.splitlines() if "LOST" in line] == ["LOST at 4"]
