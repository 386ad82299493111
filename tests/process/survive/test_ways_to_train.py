"""What people do in a step: each way survives a kill in it, bit for bit."""

import pytest

# Commits of each way, in the order in which the script goes through them.
COMMITS = {
    "batchnorm_dropout": 6, "buffers_not_broadcast": 6, "find_unused": 6, "static_graph": 6,
    "bucket_view": 6, "no_sync_inside": 6, "no_sync_across": 2, "clipping": 6, "amp_scaler": 6,
    "schedulers": 6, "comm_hook": 6, "powersgd_hook": 6, "gan": 6, "sam": 6, "lbfgs": 6,
    "own_collectives": 6, "late_collectives": 6, "by_hand": 6, "moving_average": 6,
}  # fmt: skip


def kills(rank, local_step, points):
    """One kill in every way to train, at `local_step` of it, the points taking turns."""
    faults, first = [], 0
    for n, (way, commits) in enumerate(COMMITS.items()):
        point = points[n % len(points)]
        at = min(local_step, commits - 1)
        if way == "by_hand" and point not in ("backward", "collective"):
            point = "collective"  # without an optimizer there is no such point
        if way == "find_unused" and point == "backward" and at % 2 == 0:
            point = "collective"  # the middle one of its parameters has no gradient then
        step = first + at
        faults.append(f"kill rank={rank} step={step} point={point}")
        first += commits
    return faults


def check(calm, result):
    assert result.values("steps") == {0: sum(COMMITS.values()), 1: sum(COMMITS.values())}
    # What steps returned is the same too, unless it went down in the very last step of a way.
    theirs = calm("variants.py").values("values")
    for rank, values in result.values("values").items():
        different = {way for way in values if values[way] != theirs[rank][way]}
        assert len(different) <= result.values_lost, (different, result.explain())


def test_every_way_to_train_survives_a_kill(calm, shaken):
    points = ("backward", "collective", "reduced", "update", "updated")
    check(calm, shaken("variants.py", faults=kills(1, 3, points)))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("local_step", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "points",
    [("backward", "collective", "updated"), ("update", "commit", "reduced"),
     ("collective", "between", "backward", "begin")],
)  # fmt: skip
def test_every_way_to_train_survives_a_kill_anywhere(calm, shaken, rank, local_step, points):
    check(calm, shaken("variants.py", faults=kills(rank, local_step, points)))


def test_groups_of_the_scripts_own_survive_kills_of_members_and_others(shaken):
    shaken(
        "groups.py", world=3, spares=1,
        faults=["kill rank=2 step=3 point=backward", "kill rank=1 step=6 point=collective",
                "kill rank=0 step=9 point=updated"],
    )  # fmt: skip


def test_a_rehearsed_spare_passes_on_the_order_of_buckets_that_it_never_needed(shaken):
    result = shaken(
        "reused.py", spares=1,
        faults=["kill rank=1 step=12 point=begin", "kill rank=0 step=13 point=begin"],
    )  # fmt: skip
    first, second = (incident.waited_for_spare_s for incident in result.incidents)
    assert first == 0 < second, "the second newcomer is to be one that has not rehearsed"
    assert "spares cannot rehearse evaluate" in result.stderr, result.explain()


@pytest.mark.parametrize(
    "faults",
    [
        ["kill rank=1 step=5 point=backward", "kill rank=0 step=7 point=update",
         "kill rank=1 step=13 point=forward", "kill rank=0 step=18 point=begin"],
        ["kill rank=0 step=6 point=begin", "kill rank=1 step=12 point=reduced",
         "migrate rank=0 step=16", "kill rank=1 step=19 point=backward"],
    ],
)  # fmt: skip
def test_what_is_unfrozen_on_the_way_survives_kills(calm, shaken, faults):
    result = shaken("unfreezes.py", faults=faults)
    assert result.values("modes")[0] == [False, False, False]
    for key in ("modes", "groups"):
        assert result.values(key) == calm("unfreezes.py").values(key), result.explain()


def test_a_ddp_that_is_compiled_as_a_whole_survives_a_kill(shaken):
    shaken("compiled.py", faults=["kill rank=1 step=5 point=backward"], spares=1)
