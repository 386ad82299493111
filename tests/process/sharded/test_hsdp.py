"""FSDP2 on meshes with a replicate axis: a lost shard comes from the ranks that hold the same."""

import itertools
from pathlib import Path

import pytest

from trainonce.events import ReplicasDiffer
from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "sharded.py"
HSDP = ("rep:2", "shard:2")
POINTS = (
    "begin", "forward", "backward", "collective", "reduced", "update", "updated", "commit",
    "between",
)  # fmt: skip


def kills(points, *, num_ranks=4, first_rank=1, first_step=1, stride=1):
    """One kill a point, each in a step of its own, the ranks taking turns."""
    return [
        f"kill rank={(first_rank + n) % num_ranks} step={first_step + stride * n} point={point}"
        for n, point in enumerate(points)
    ]


def test_a_lost_shard_is_rebuilt_and_the_end_is_that_of_plain_fsdp2_under_torchrun(shaken):
    result = shaken("plain", *HSDP, faults=kills(("backward", "updated", "collective"), stride=3))
    assert "2 parts with 2 living copies" in result.stderr
    for incident in result.incidents:
        assert incident.digest_before == incident.digest_after != ""
        assert incident.micro_batches_recomputed == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("points", [POINTS[:5], POINTS[5:]])
def test_any_rank_can_be_killed_at_any_point(shaken, rank, points):
    shaken("plain", *HSDP, faults=kills(points, first_rank=rank, stride=2))


@pytest.mark.slow
def test_stalled_ranks_are_replaced(plain, tmp_path):
    """Between the collectives of a step, and in its update."""
    faults = ("stop rank=3 step=3 point=collective after=6", "stop rank=0 step=6 point=update",
              "stop rank=2 step=9 point=backward")  # fmt: skip
    result = run_job(
        SCRIPT, "clipping", *HSDP, nproc_per_node=4, spares=2, chaos="; ".join(faults),
        home=tmp_path,
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("stop", times=3, cause="hang", served_by="rebuild", steps_lost=0)
    result.assert_same_state(plain("clipping", *HSDP))


@pytest.mark.slow
def test_a_flipped_bit_in_one_of_three_copies_of_a_shard_is_repaired(plain, tmp_path):
    axes = ("rep:3", "shard:2")
    result = run_job(
        SCRIPT, "clipping", *axes, "--verify-every", 2, nproc_per_node=6, home=tmp_path,
        chaos="flip rank=3 step=4 point=between",
    )  # fmt: skip
    result.assert_completed()
    (found,) = [event for event in result.events if isinstance(event, ReplicasDiffer)]
    assert (found.odd_ranks, found.repaired_from) == ([3], 1)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["backward", "collective", "updated"])
def test_the_first_steps_and_the_last_survive_a_kill(shaken, point):
    faults = [f"kill rank={step % 4} step={step} point={point}" for step in (0, 1, 2, 13)]
    shaken("plain", *HSDP, faults=faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["accumulate", "across", "clipping", "mixed", "offload", "recompute", "compiled"]
)
def test_every_way_to_train_survives_kills(shaken, way):
    shaken(way, *HSDP, faults=kills(("backward", "collective", "updated", "reduced"), stride=3))


@pytest.mark.slow
def test_tensor_parallel_with_a_replicate_axis_survives_kills(shaken):
    faults = kills(("backward", "collective", "updated", "forward"), stride=3)
    shaken("tensor", "rep:2", "shard:1", "tp:2", faults=faults)


@pytest.mark.slow
def test_every_collective_of_a_step_can_be_the_last(shaken):
    """Kills right after the n-th collective: all-gathers, reduce-scatters, all-reduces, norm."""
    faults = [
        f"kill rank={rank} step={step} point=collective after={step - 1}"
        for step, rank in zip(range(1, 14), itertools.cycle((3, 0)), strict=False)
    ]
    shaken("clipping", *HSDP, faults=faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "dead"),
    [(("rep:3", "shard:2"), (0, 3)), (("rep:2", "shard:2", "tp:1"), (0, 3)),
     (("rep:2", "shard:2"), (0, 1)), (("rep:2", "shard:2"), (1, 2))],
)  # fmt: skip
def test_two_ranks_lost_at_once_are_rebuilt_where_each_shard_has_a_copy(shaken, axes, dead):
    faults = [
        f"kill rank={rank} step={step} point={point}"
        for step, point in ((3, "backward"), (6, "collective"), (9, "updated"))
        for rank in dead
    ]
    result = shaken("clipping", *axes, faults=faults)
    for incident in result.incidents:
        assert incident.digest_before == incident.digest_after != ""


@pytest.mark.slow
def test_a_rank_killed_while_it_is_rebuilt_is_rebuilt_again(shaken):
    shaken(
        "plain", "rep:3", "shard:2",
        faults=["kill rank=2 step=4 point=backward", "kill rank=2 step=4 point=promotion",
                "kill rank=0 step=4 point=donate"],
    )  # fmt: skip
