"""Planned moves of ranks that hold a part, while who holds the same part dies or hangs."""

from pathlib import Path

import pytest

from trainonce.testing import run_job

SCRIPTS = Path(__file__).parent / "scripts"
pytestmark = pytest.mark.slow


def lose_in_a_move(plain, home, fault, way, *axes, moved, other, num_ranks=4, script="sharded.py"):
    """Lose `other`, which holds what `moved` holds, while that one's successor takes over."""
    faults = (f"slow rank={other} step=4 point=begin for=4s", f"migrate rank={moved} step=4",
              fault.replace(" ", f" rank={other} step=4 ", 1))  # fmt: skip
    result = run_job(
        SCRIPTS / script, way, *axes, "--steps", 40, nproc_per_node=num_ranks, spares=2,
        chaos="; ".join(faults), home=home,
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired(fault.split()[0], rank=other, served_by="rebuild")
    assert next(i.served_by for i in result.incidents if i.planned) == "predecessor"
    result.assert_nothing_lost()
    result.assert_same_state(plain(way, *axes, steps=40, script=script, num_ranks=num_ranks))


@pytest.mark.parametrize("fault", ["kill point=donate", "stop point=recovery"])
def test_a_shard(plain, tmp_path, fault):
    lose_in_a_move(plain, tmp_path, fault, "clipping", "rep:2", "shard:2", moved=0, other=2)


@pytest.mark.parametrize("way", [("gpipe", "reduce"), ("1f1b", "ddp")])
@pytest.mark.parametrize("fault", ["kill point=donate", "kill point=recovery"])
def test_a_stage_of_a_pipeline(plain, tmp_path, fault, way):
    lose_in_a_move(
        plain, tmp_path, fault, *way, "pp:2", "rep:2", moved=0, other=1, script="pipeline.py"
    )


def test_one_that_exchanges_messages(plain, tmp_path):
    lose_in_a_move(
        plain, tmp_path, "kill point=donate", "all", moved=1, other=0, num_ranks=3,
        script="messages.py",
    )  # fmt: skip
