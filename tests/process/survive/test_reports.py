"""A process that dies after its update takes nothing along of what its step reports."""

from pathlib import Path

import pytest

from trainonce.testing import JobResult, run_job

SCRIPT = Path(__file__).parent / "scripts" / "reports.py"
KILLS = ["kill rank=0 step=1", "kill rank=1 step=4", "kill rank=0 step=8", "kill rank=1 step=11"]


def run(home: Path, kind: str, *kills: str, copies_mb: str = "") -> JobResult:
    chaos = "; ".join(f"{kill} point=updated" for kill in kills)
    env = {"TRAINONCE_EXACT_RETURNS_MB": copies_mb}
    result = run_job(SCRIPT, kind, spares=1, chaos=chaos, env=env, home=home)
    result.assert_completed()
    assert len(result.faults) == len(kills), result.explain()
    result.assert_nothing_lost()
    return result


@pytest.mark.parametrize("kind", ["averaged", "returned", "attribute", "nothing", "unknown"])
def test_what_is_reported_after_the_update_is_the_same_where_the_process_died_there(kind, tmp_path):
    without = run(tmp_path / "without", kind)
    result = run(tmp_path / "with", kind, *KILLS)
    assert result.values("history") == without.values("history"), result.explain()
    assert not result.values_lost


def test_without_a_copy_of_the_state_what_no_variable_held_is_lost_and_told(tmp_path):
    without = run(tmp_path / "without", "unknown").values("history")
    result = run(tmp_path / "with", "unknown", "kill rank=1 step=4", copies_mb="0")
    for rank, history in result.values("history").items():
        assert [i for i, told in enumerate(history) if told != without[rank][i]] == [4]
    assert result.values_lost == 1
    assert "went down" in result.stderr
    assert "a step returns or averages what no variable held before its update" in result.stderr
