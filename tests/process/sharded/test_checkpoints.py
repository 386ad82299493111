"""Durable checkpoints of split state: every rank writes its part, and any mesh reads it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainonce.checkpoint.store import CheckpointStore
from trainonce.checkpoint.tensors import export_model, read_tensors, read_whole
from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "sharded.py"
SPLIT = ("rep:1", "shard:2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A job on two ranks that ended after six steps, and its last checkpoint."""
    home = tmp_path_factory.mktemp("saved")
    result = run_job(SCRIPT, "plain", *SPLIT, "--steps", 6, home=home)
    result.assert_completed()
    info, skipped = CheckpointStore(home / "jobs" / result.job / "checkpoints").newest_valid()
    assert info is not None
    assert not skipped
    assert info.step == 6
    return result, info


def resume(saved, home, axes, ranks, steps=6):
    _, info = saved
    again = run_job(
        SCRIPT, "plain", *axes, "--steps", steps, nproc_per_node=ranks, home=home,
        options=("--resume", str(info.path.parent)),
    )  # fmt: skip
    again.assert_completed()
    assert "resumed from the checkpoint of step 6" in again.stderr
    return again


def test_a_checkpoint_of_two_shards_is_read_by_one_rank_with_every_bit(saved, tmp_path):
    result, info = saved
    assert {"model-00001.safetensors", "state-00001.safetensors"} <= info.files.keys()
    again = resume(saved, tmp_path, ("shard:1",), 1)
    assert again.values("whole")[0] == result.values("whole")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "ranks"),
    [(("shard:4",), 4), (("rep:2", "shard:2"), 4), (("shard:3",), 3), (("rep:2", "shard:1"), 2)],
)
def test_a_checkpoint_is_read_on_another_mesh_with_every_bit(saved, tmp_path, axes, ranks):
    result, _ = saved
    again = resume(saved, tmp_path, axes, ranks)
    wholes = again.values("whole")
    assert len(wholes) == ranks
    assert all(whole == result.values("whole")[0] for whole in wholes.values())


@pytest.mark.slow
def test_a_run_resumed_on_the_same_mesh_ends_as_one_that_never_stopped(saved, tmp_path, plain):
    again = resume(saved, tmp_path, SPLIT, 2, steps=14)
    again.assert_same_state(plain("plain", *SPLIT))


def test_a_model_is_exported_to_hugging_faces_layout_and_read_back(saved, tmp_path):
    _, info = saved
    target = tmp_path / "model.safetensors"
    export_model(info.path, target, prefix="model.")
    exported = load_file(target)
    assert exported["2.up.weight"].shape == (33, 16)
    several = tmp_path / "several"
    several.mkdir()
    export_model(info.path, several / "model.safetensors", prefix="model.", max_file_bytes=4096)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == exported.keys()
    assert len(set(index["weight_map"].values())) > 1
    again = read_whole(several, list(exported))
    assert all(torch.equal(again[name], tensor) for name, tensor in exported.items())
    into = {"2.up.weight": torch.empty(33, 16)}
    read_tensors(several, into)
    assert torch.equal(into["2.up.weight"], exported["2.up.weight"])
