"""SIGKILL of any rank at any point of any step ends in the state of the run without it.

Several kills share a job where they do not disturb each other: starting a process is what
these tests spend their time on.
"""

import itertools

import pytest

LAST = 19
POINTS = (
    "forward", "backward", "collective", "reduced", "update", "updated", "commit", "between",
)  # fmt: skip


def kills(ranks, points, first_step=3, stride=2):
    """One kill a point, each in a step of its own, the ranks taking turns."""
    return [
        f"kill rank={rank} step={first_step + stride * n} point={point}"
        for n, (point, rank) in enumerate(zip(points, itertools.cycle(ranks), strict=False))
    ]


def assert_each_was_rebuilt(result):
    for fault in result.faults:
        result.assert_fired(
            "kill", rank=fault.rank, step=fault.step, point=fault.point,
            cause="signal", detail="SIGKILL", detected_by="process exit", served_by="rebuild",
        )  # fmt: skip


def test_a_rank_killed_at_any_point_of_a_step_is_rebuilt_bit_for_bit(shaken):
    result = shaken("basic.py", faults=kills([1, 0], POINTS))
    assert_each_was_rebuilt(result)
    digests = [(i.digest_before, i.digest_after) for i in result.incidents]
    assert all(before == after != "" for before, after in digests)


@pytest.mark.slow
def test_the_other_rank_killed_at_any_point_is_rebuilt_bit_for_bit(shaken):
    assert_each_was_rebuilt(shaken("basic.py", faults=kills([0, 1], POINTS)))


def test_kills_in_the_first_three_steps_and_the_last_are_survived(shaken):
    faults = [
        "kill rank=0 step=0 point=collective", "kill rank=1 step=1 point=backward",
        "kill rank=0 step=2 point=update", f"kill rank=1 step={LAST} point=backward",
        "kill rank=0 step=20 point=end",
    ]  # fmt: skip
    assert_each_was_rebuilt(shaken("basic.py", faults=faults))


def test_a_rank_lost_in_the_first_step_is_rebuilt_however_long_others_take_to_set_up(shaken):
    faults = ["kill rank=0 step=0 point=begin"]
    assert_each_was_rebuilt(shaken("basic.py", "--uneven-s", 0.3, faults=faults, spares=1))


@pytest.mark.slow
@pytest.mark.parametrize("point", [*POINTS, "begin"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_three_steps_survive_a_kill_at_every_point(shaken, point, rank):
    first = 1 if point == "commit" else 0  # at a commit, it counts
    faults = [f"kill rank={rank} step={first + n} point={point}" for n in range(3)]
    assert_each_was_rebuilt(shaken("basic.py", faults=faults))


@pytest.mark.parametrize(("world", "points"), [(3, ("backward", "updated", "collective")),
                                               (4, ("collective", "commit"))])  # fmt: skip
def test_any_rank_of_three_and_four_can_be_lost(shaken, world, points):
    ranks = [world - 1, 0, 1]
    assert_each_was_rebuilt(shaken("basic.py", faults=kills(ranks, points), world=world, spares=1))


def test_without_a_spare_the_job_waits_for_a_new_worker_and_says_so(shaken):
    result = shaken("basic.py", faults=["kill rank=0 step=4 point=backward"], spares=0)
    assert "no spare is ready" in result.stderr
    (incident,) = result.incidents
    assert incident.waited_for_spare_s > 0
