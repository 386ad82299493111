"""State of which no other rank holds a copy goes on from its shadow in memory."""

from pathlib import Path

import pytest

from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "sharded.py"
ALONE = ("shard:2",)


def test_a_shard_without_a_replica_goes_on_from_its_shadow(shaken):
    result = shaken(
        "plain", *ALONE, served_by="shadow",
        faults=["kill rank=1 step=3 point=backward", "kill rank=0 step=6 point=updated"],
    )  # fmt: skip
    assert "2 parts with 1 living copy" in result.stderr
    assert "a shadow of the state is kept in memory" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "points", [("begin", "forward", "backward", "collective"),
               ("reduced", "update", "updated"), ("commit", "between")],
)  # fmt: skip
def test_any_rank_without_a_replica_can_be_killed_at_any_point(shaken, rank, points):
    faults = [f"kill rank={rank} step={2 * n + 1} point={p}" for n, p in enumerate(points)]
    faults += [f"kill rank={rank} step=0 point=collective", f"kill rank={rank} step=14 point=end"]
    faults = faults if "begin" in points else faults[:-2]
    shaken("accumulate", *ALONE, faults=faults, served_by="shadow")


@pytest.mark.slow
def test_a_rank_killed_while_it_goes_on_from_its_shadow_does_so_again(shaken):
    shaken(
        "plain", *ALONE, served_by="shadow",
        faults=["kill rank=1 step=4 point=backward", "kill rank=1 step=4 point=promotion",
                "kill rank=0 step=8 point=updated", "kill rank=0 step=9 point=promotion"],
    )  # fmt: skip


@pytest.mark.slow
def test_a_rank_without_a_replica_can_be_moved(plain, tmp_path):
    result = run_job(
        SCRIPT, "plain", *ALONE, spares=1, chaos="migrate rank=1 step=4", home=tmp_path
    )
    result.assert_completed()
    (incident,) = result.incidents
    assert (incident.cause, incident.steps_lost) == ("migration", 0)
    result.assert_same_state(plain("plain", *ALONE))


@pytest.mark.slow
def test_an_optimizer_that_splits_its_state_by_itself_goes_on_from_its_shadows(shaken):
    faults = [
        f"kill rank={n % 2} step={3 * n + 1} point={point}"
        for n, point in enumerate(("backward", "collective", "reduced", "updated"))
    ]
    shaken("zero", *ALONE, faults=faults, served_by="shadow")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("rep:1", "shard:4"), ("shard:4",)])
def test_neighbours_lost_at_once_go_on_from_their_shadows(shaken, axes):
    faults = [
        f"kill rank={rank} step={step} point={point}"
        for step, point in ((3, "backward"), (6, "updated"), (9, "collective"))
        for rank in (1, 2)
    ]
    shaken("clipping", *axes, faults=faults, served_by="shadow")


def test_a_job_of_one_rank_survives_its_own_crash(tmp_path):
    faults = ("kill rank=0 step=3 point=backward", "kill rank=0 step=9 point=update")
    calm = run_job(SCRIPT, "plain", "shard:1", nproc_per_node=1, home=tmp_path / "calm")
    result = run_job(
        SCRIPT, "plain", "shard:1", nproc_per_node=1, chaos="; ".join(faults), home=tmp_path / "a"
    )
    result.assert_completed()
    result.assert_fired("kill", times=2, cause="signal", served_by="shadow")
    # In the backward pass the copy of the last commit may not be whole yet; by the update it is.
    assert [incident.steps_lost for incident in result.incidents] in ([0, 0], [1, 0])
    result.assert_same_state(calm)


@pytest.mark.slow
def test_a_shadow_of_every_fifth_step_costs_what_was_said(plain, tmp_path):
    result = run_job(
        SCRIPT, "plain", *ALONE, "--shadow-every", 5, spares=1,
        chaos="kill rank=1 step=8 point=backward", home=tmp_path / "home",
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("kill", rank=1, step=8, served_by="shadow", steps_lost=3)
    assert "a loss costs up to 5 steps" in result.stderr
    result.assert_same_state(plain("plain", *ALONE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "says"),
    [(("rep:2", "shard:2"), "a mesh cannot be made"), (("shard:2",), "leaves out this one")],
    ids=["larger", "smaller"],
)
def test_a_mesh_that_is_not_of_the_jobs_size_is_explained(tmp_path, axes, says):
    result = run_job(SCRIPT, "plain", *axes, nproc_per_node=3, home=tmp_path)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "hint: make the sizes of its axes multiply to 3" in result.stderr


def test_redundancy_that_is_promised_and_not_there_is_refused(tmp_path):
    result = run_job(
        SCRIPT, "plain", "shard:1", "--shadow-every", 0, nproc_per_node=1,
        options=("--require-redundancy", "1"), home=tmp_path,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "the state of ranks 0 has 0 further copies" in result.stderr
    assert "shadow_every=1" in result.stderr
