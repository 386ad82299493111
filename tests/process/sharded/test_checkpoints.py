"""Durable checkpoints of split state: every rank writes its part, and any mesh reads it."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainonce.checkpoint.store import CheckpointStore
from trainonce.checkpoint.tensors import export_model, read_tensors, read_whole
from trainonce.errors import StateMismatchError
from trainonce.testing import run_job
from trainonce.worker.state import Protected

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


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """A job whose optimizer splits its state by itself, on two ranks, after six steps."""
    home = tmp_path_factory.mktemp("zero")
    result = run_job(SCRIPT, "zero", "shard:2", "--steps", 6, home=home)
    result.assert_completed()
    info, skipped = CheckpointStore(home / "jobs" / result.job / "checkpoints").newest_valid()
    assert info is not None
    assert not skipped
    return result, info


def resume_zero(info, home, ranks, *args, chaos=""):
    again = run_job(
        SCRIPT, "zero", f"shard:{ranks}", *args, nproc_per_node=ranks, home=home, chaos=chaos,
        options=("--resume", str(info.path.parent)),
    )  # fmt: skip
    again.assert_completed()
    assert "resumed from the checkpoint of step 6" in again.stderr
    return again


def by_parameter(result):
    """Return the optimizer state of every parameter, whoever keeps it."""
    parts = result.values("by_parameter").values()
    merged = {name: state for part in parts for name, state in part.items()}
    assert len(merged) == sum(map(len, parts)), "two ranks keep the same"
    return merged


def test_an_optimizer_that_splits_its_state_is_resumed_after_all_ranks_were_killed(zero, tmp_path):
    """Without shadows, so that the checkpoint is all that is left; every bit as never stopped."""
    _, info = zero
    assert {"state-00001.safetensors", "tree-00001.bin"} <= info.files.keys()
    again = resume_zero(
        info, tmp_path / "again", 2, "--shadow-every", 0,
        chaos="kill rank=0 step=9 point=begin; kill rank=1 step=9 point=begin",
    )  # fmt: skip
    again.assert_fired("kill", times=2, cause="signal", served_by="checkpoint", step=9)
    again.assert_same_state(run_job(SCRIPT, "zero", "shard:2", home=tmp_path / "calm"))


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_its_parts_are_shared_out_anew_on_another_number_of_ranks(zero, tmp_path, ranks):
    result, info = zero
    again = resume_zero(info, tmp_path, ranks, "--steps", 6)
    assert by_parameter(again) == by_parameter(result)
    assert len(by_parameter(result)) == 18
    if ranks > 1:
        kept = [set(part) for part in again.values("by_parameter").values()]
        assert all(kept), "somebody keeps nothing: the model is too small for this test"


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


def test_optimizer_state_that_cannot_be_split_for_another_mesh_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        module = torch.nn.Linear(4, 6)
        module.weight = torch.nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
        optimizer = torch.optim.SGD(module.parameters())
        optimizer.state[module.weight]["rows"] = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
        protected = Protected({"model": module, "optimizer": optimizer})
        with pytest.raises(StateMismatchError, match="cannot be split for another mesh") as caught:
            protected.prepare_whole(protected.describe_whole())
        assert "resume on the mesh" in caught.value.hint
    finally:
        dist.destroy_process_group()
