"""Planned moves that meet deaths and hangs: two copies are there until the successor is one."""

import pytest


def moves(result):
    """Return rank and way of each move, in order."""
    return [(i.ranks[0], i.served_by) for i in result.incidents if i.planned]


@pytest.mark.parametrize("fault", ["kill rank=1 step=9 point=donate",
                                   "stop rank=1 step=9 point=recovery"])  # fmt: skip
def test_the_other_copy_is_lost_while_the_successor_takes_over(shaken, fault):
    # Slow, so that the spare is ready by then.
    slow, move = "slow rank=1 step=9 point=forward for=2s", "migrate rank=0 step=9"
    result = shaken("basic.py", "--steps", 210, faults=[slow, move, fault], put_off=1, spares=1)
    action, _, _, point = fault.replace("point=", "").split()
    result.assert_fired(action, rank=1, point=point, served_by="rebuild")
    # The move is done again once there is a spare, unless the job is over before.
    assert moves(result)[0] == (0, "predecessor"), result.explain()
    assert set(moves(result)[1:]) <= {(0, "migration")}, result.explain()


def test_moves_meet_the_death_of_a_successor_and_kills_at_the_commit_of_the_drain(shaken):
    result = shaken(
        "basic.py", "--steps", 210,
        faults=["slow rank=1 step=9 point=forward for=2s", "migrate rank=0 step=9",
                "kill rank=0 step=9 point=promotion",
                "slow rank=0 step=99 point=forward for=2s", "migrate rank=1 step=99",
                "kill rank=0 step=100 point=commit",
                "slow rank=1 step=199 point=forward for=2s", "migrate rank=0 step=199",
                "kill rank=1 step=200 point=between"],
        put_off=1,
    )  # fmt: skip
    result.assert_fired("kill", rank=0, point="promotion", served_by="predecessor")
    result.assert_fired("kill", rank=0, point="commit", served_by="rebuild")
    result.assert_fired("kill", rank=1, point="between", served_by="rebuild")
    assert moves(result)[0] == (0, "predecessor"), result.explain()
