"""Pipelines of stages, and messages between single ranks."""

import functools
from pathlib import Path

import pytest

from trainonce.checkpoint.store import CheckpointStore
from trainonce.events import ReplicasDiffer
from trainonce.testing import run_job

SCRIPTS = Path(__file__).parent / "scripts"
PIPELINE = SCRIPTS / "pipeline.py"
MESSAGES = SCRIPTS / "messages.py"
# Ranks 0 and 1 hold the first stage, ranks 2 and 3 the last.
TWO_BY_TWO = ("pp:2", "rep:2")


@pytest.fixture
def stages(shaken):
    """As `shaken`, for pipelines."""
    return functools.partial(shaken, script="pipeline.py", steps=12)


@pytest.fixture
def talks(shaken):
    """As `shaken`, for data parallel ranks that send each other messages."""
    return functools.partial(shaken, script="messages.py", steps=12, num_ranks=3)


def test_a_lost_stage_is_rebuilt_and_the_end_is_that_of_plain_pipelining_under_torchrun(stages):
    result = stages(
        "1f1b", "ddp", *TWO_BY_TWO,
        faults=["kill rank=0 step=2 point=forward after=2",
                "kill rank=3 step=5 point=backward after=1", "kill rank=2 step=8 point=updated"],
    )  # fmt: skip
    assert "2 parts with 2 living copies" in result.stderr
    for incident in result.incidents:
        assert incident.digest_before == incident.digest_after != ""
        assert incident.micro_batches_recomputed == 1


def test_messages_of_a_scripts_own_survive_kills_of_both_ends(talks):
    talks(
        "all",
        faults=["kill rank=0 step=1 point=collective after=1",
                "kill rank=1 step=3 point=collective after=6", "kill rank=1 step=5 point=updated",
                "kill rank=0 step=7 point=collective after=9",
                "kill rank=1 step=7 point=collective after=9"],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("way", [("gpipe", "reduce"), ("1f1b", "ddp")])
def test_any_rank_of_any_stage_can_be_killed_at_any_point(stages, way, rank):
    """In forward and backward passes, before and within the reduction, in the optimizer."""
    points = (
        "1 point=begin", "2 point=forward after=1", "3 point=backward after=2",
        "4 point=collective after=3", "5 point=reduced", "6 point=update", "7 point=updated",
        # Who takes over from the one before stands behind its commit.
        "9 point=commit", "10 point=between",
    )  # fmt: skip
    stages(*way, *TWO_BY_TWO, faults=[f"kill rank={rank} step={each}" for each in points])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_every_message_of_a_step_can_be_the_last(stages, rank):
    """Kills right after the n-th message or collective, also while stages get ready."""
    faults = [f"kill rank={rank} step={n} point=collective after={n}" for n in range(12)]
    stages("1f1b", "reduce", *TWO_BY_TWO, faults=faults)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2, 4, 6])
def test_ranks_lost_while_the_stages_first_get_ready_are_rebuilt(stages, after):
    faults = [f"kill rank={rank} step=0 point=collective after={after}" for rank in (0, 3)]
    stages("1f1b", "ddp", *TWO_BY_TWO, faults=faults)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [(0, 3), (0, 2), (1, 2)])
def test_two_ranks_lost_at_once_are_rebuilt_where_each_stage_has_a_copy(stages, dead):
    """Of different replicas, and both ends of one pipeline."""
    faults = [
        f"kill rank={rank} step={step} point={point}"
        for step, point in ((2, "forward after=1"), (5, "collective after=4"), (8, "updated"))
        for rank in dead
    ]
    stages("1f1b", "ddp", *TWO_BY_TWO, faults=faults)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_schedules_whose_shapes_are_given_survive_kills(stages, schedule):
    """With DDP, torch itself fails where these ask for shapes: its first step reduces twice."""
    stages(
        schedule, "ddp", *TWO_BY_TWO, arguments=("--shapes", "given"),
        faults=["kill rank=3 step=0 point=backward after=1",
                "kill rank=2 step=1 point=forward", "kill rank=0 step=4 point=updated"],
    )  # fmt: skip


@pytest.mark.slow
def test_stages_that_come_round_survive_kills(stages):
    stages(
        "interleaved", "reduce", *TWO_BY_TWO,
        faults=["kill rank=1 step=2 point=forward after=5",
                "kill rank=2 step=5 point=backward after=3",
                "kill rank=0 step=8 point=collective after=9"],
    )  # fmt: skip


@pytest.mark.slow
def test_stages_under_hsdp_survive_kills(stages):
    stages(
        "gpipe", "hsdp", "pp:2", "rep:2", "shard:1",
        faults=["kill rank=1 step=2 point=forward after=1",
                "kill rank=2 step=5 point=collective after=9", "kill rank=3 step=8 point=update"],
    )  # fmt: skip


@pytest.mark.slow
def test_a_change_between_training_and_evaluation_survives_kills(stages):
    """Stages get ready anew at each change; a newcomer does so for the first time."""
    stages(
        "1f1b", "ddp", *TWO_BY_TWO, arguments=("--evaluate-every", 2),
        faults=["kill rank=0 step=2 point=forward after=1",
                "kill rank=3 step=7 point=forward after=2",
                "kill rank=2 step=10 point=collective after=2"],
    )  # fmt: skip


@pytest.mark.slow
def test_stalled_ranks_of_a_pipeline_are_replaced(plain, tmp_path):
    result = run_job(
        PIPELINE, "1f1b", "ddp", *TWO_BY_TWO, nproc_per_node=4, spares=2,
        chaos="stop rank=2 step=3 point=backward after=1; stop rank=0 step=7 point=collective",
        home=tmp_path,
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("stop", times=2, cause="hang", served_by="rebuild", steps_lost=0)
    result.assert_same_state(plain("1f1b", "ddp", *TWO_BY_TWO, steps=12, script="pipeline.py"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stages_without_a_replica_go_on_from_their_shadows(stages, rank):
    points = (
        "forward after=1", "backward after=2", "collective after=3", "reduced", "update", "updated",
    )  # fmt: skip
    result = stages(
        "1f1b", "none", "pp:2", served_by="shadow",
        faults=[f"kill rank={rank} step={n + 1} point={p}" for n, p in enumerate(points)],
    )  # fmt: skip
    assert "2 parts with 1 living copy" in result.stderr


@pytest.mark.slow
def test_both_stages_lost_at_once_go_on_from_their_shadows(stages):
    faults = [f"kill rank={rank} step=4 point=backward after=1" for rank in (0, 1)]
    stages("gpipe", "none", "pp:3", faults=faults, served_by="shadow")


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["ddp", "zero"])
def test_a_checkpoint_of_stages_is_resumed_with_every_bit(plain, tmp_path, sync):
    run = functools.partial(run_job, PIPELINE, "1f1b", sync, *TWO_BY_TWO, nproc_per_node=4)
    begun = run("--steps", 5, home=tmp_path / "begun")
    begun.assert_completed()
    folder = tmp_path / "begun" / "jobs" / begun.job / "checkpoints"
    info, _ = CheckpointStore(folder).newest_valid()
    assert {"model.safetensors", "model-00002.safetensors"} <= info.files.keys()
    resumed = run("--steps", 12, home=tmp_path / "resumed", options=("--resume", str(folder)))
    resumed.assert_completed()
    assert "resumed from the checkpoint of step 5" in resumed.stderr
    resumed.assert_same_state(plain("1f1b", sync, *TWO_BY_TWO, steps=12, script="pipeline.py"))


@pytest.mark.slow
def test_stages_are_told_from_a_mistake(tmp_path):
    result = run_job(
        PIPELINE, "1f1b", "ddp", *TWO_BY_TWO, "--replicas", "unnamed", nproc_per_node=4,
        home=tmp_path,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "registered different state: models." in result.stderr
    assert 'replicas=mesh["replicate"]' in result.stderr


@pytest.mark.slow
def test_a_message_after_the_update_holds_back_the_commit_of_all(talks):
    talks(
        "late",
        faults=["kill rank=1 step=2 point=updated", "kill rank=0 step=5 point=updated",
                "kill rank=2 step=8 point=updated", "kill rank=1 step=10 point=commit"],
    )  # fmt: skip


@pytest.mark.slow
def test_who_handed_messages_to_a_newcomer_can_die_before_they_are_received(talks):
    """The successor of the one does not send what the other has, which has not asked for it yet."""
    talks(
        "all",
        faults=["kill rank=1 step=3 point=collective after=6", "kill rank=0 step=3 point=donate",
                "kill rank=1 step=7 point=collective after=9", "kill rank=0 step=7 point=donate"],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "says"),
    [("unreceived", "messages of this step were sent and not received"),
     ("sometimes", "in a later execution of a step, and none was in an earlier one"),
     ("anywhere", "dist.recv without a source takes whatever comes first")],
)  # fmt: skip
def test_messages_that_cannot_be_kept_apart_are_refused(tmp_path, way, says):
    result = run_job(MESSAGES, way, nproc_per_node=2, home=tmp_path)
    assert result.exit_code == 1
    assert says in result.stderr


@pytest.mark.slow
def test_a_flipped_bit_in_one_of_three_copies_of_a_stage_is_repaired(plain, tmp_path):
    axes = ("pp:2", "rep:3")
    result = run_job(
        PIPELINE, "1f1b", "ddp", *axes, "--verify-every", 2, nproc_per_node=6, home=tmp_path,
        chaos="flip rank=4 step=4 point=between",
    )  # fmt: skip
    result.assert_completed()
    (found,) = [event for event in result.events if isinstance(event, ReplicasDiffer)]
    assert (found.odd_ranks, found.repaired_from) == ([4], 3)
