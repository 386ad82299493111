"""What collectives outside of steps leave behind is bounded."""

from pathlib import Path

from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "outside.py"


def test_a_rank_lost_after_too_many_collectives_to_keep_costs_a_restart_and_no_bit(calm, tmp_path):
    result = run_job(
        SCRIPT, spares=1, home=tmp_path,
        chaos="kill rank=1 step=4 point=begin; kill rank=0 step=7 point=backward",
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("kill", rank=1, step=4, cause="signal", served_by="restart")
    # Past the next commit nobody asks for them any more.
    result.assert_fired("kill", rank=0, step=7, cause="signal", served_by="rebuild", steps_lost=0)
    assert "collectives outside of steps were too many" in result.stderr
    assert result.stderr.count("so many collectives outside of steps") == 1
    result.assert_same_state(calm("outside.py"))
    assert all(kept < 60 for kept in calm("outside.py").values("kept").values())


def test_messages_between_steps_arrive_however_many_are_under_way(calm):
    result = calm("messages_outside.py")
    assert result.values("got") == {0: [], 1: [[float(number)] for number in range(80)]}
    assert "so many collectives" not in result.stderr
