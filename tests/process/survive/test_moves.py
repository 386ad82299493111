"""Planned moves that meet deaths and hangs: two copies are there until the successor is one."""

import pytest

# The other rank is slow in the step in which the move is asked for, so that it is there that the
# rank to be moved drains: at the commit that ends it. The one that the move's successor asks for
# state may still stand at the commit before.
SLOW = "slow rank=1 step=9 point=forward for=1s"
MOVE = "migrate rank=0 step=9"


@pytest.mark.parametrize("point", ["recovery", "donate"])
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_the_other_copy_is_lost_while_the_successor_takes_over(shaken, action, point):
    result = shaken(
        "basic.py", "--steps", 200, faults=[SLOW, MOVE, f"{action} rank=1 step=10 point={point}"],
        perhaps=[f"{action} rank=1 step=9 point={point}"], spares=1,
    )  # fmt: skip
    assert [each.fault for each in result.faults].count(action) == 1, result.explain()
    result.assert_fired(action, rank=1, point=point, served_by="rebuild")
    moves = [(i.ranks, i.served_by) for i in result.incidents if i.planned]
    assert moves == [([0], "predecessor"), ([0], "migration")], result.explain()


def test_a_kill_at_the_very_commit_at_which_the_other_drains(shaken):
    result = shaken(
        "basic.py", "--steps", 200,
        faults=[SLOW, MOVE, "kill rank=1 step=10 point=commit",
                "slow rank=0 step=49 point=forward for=1s", "migrate rank=1 step=49",
                "kill rank=0 step=50 point=between"],
    )  # fmt: skip
    result.assert_fired("kill", rank=1, point="commit", served_by="rebuild")
    result.assert_fired("kill", rank=0, point="between", served_by="rebuild")


def test_a_successor_that_dies_leaves_the_rank_where_it_was_until_the_next(shaken):
    result = shaken(
        "basic.py", "--steps", 200, faults=[SLOW, MOVE, "kill rank=0 step=10 point=promotion"],
        perhaps=["kill rank=0 step=9 point=promotion"],
    )  # fmt: skip
    result.assert_fired("kill", rank=0, point="promotion", served_by="predecessor")
    assert result.incidents[-1].served_by == "migration", result.explain()
