import fcntl
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from trainonce.checkpoint import manifest, tensors
from trainonce.checkpoint.store import CheckpointStore
from trainonce.clock import FakeClock
from trainonce.errors import CheckpointError


def state_at(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(64, 3, generator=generator),
        "model.count": torch.tensor(step),
        "optimizer.0.exp_avg": torch.randn(64, 3, generator=generator),
    }


def save(store: CheckpointStore, step: int, world_size: int = 2, **options):
    staging = store.begin(step, world_size)
    for rank in range(world_size):
        staging.write_rank(rank, f"rank {rank} at {step}".encode())
    staging.write_replicated(
        state_at(step), f"tree {step}".encode(), model_names=["model.weight"], **options
    )
    return staging.commit()


def empty_like(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 7) for name, tensor in state.items()}


def assert_holds(store: CheckpointStore, step: int) -> None:
    info, _skipped = store.newest_valid()
    assert info is not None
    assert info.step == step
    into = empty_like(state_at(step))
    loaded = store.load(info, into)
    assert loaded.tree == f"tree {step}".encode()
    for name, tensor in state_at(step).items():
        assert torch.equal(into[name], tensor)
    assert [loaded.rank_payload(rank) for rank in (0, 1)] == [
        f"rank {rank} at {step}".encode() for rank in (0, 1)
    ]


def names_in(store: CheckpointStore) -> list[str]:
    return sorted(os.listdir(store.folder))


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "folder")
    assert store.newest_valid() == (None, [])
    info = save(store, 120)
    assert info.path == store.folder / "step-000000120"
    assert info.size_bytes == sum(
        path.stat().st_size for path in info.path.iterdir() if path.name != manifest.NAME
    )
    assert_holds(store, 120)
    assert manifest.read(info.path) == info


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.tensor([1 + 2j], dtype=torch.complex64),
        torch.tensor([[1 + 2j, 3 - 1j]], dtype=torch.complex128),
        torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(12).reshape(3, 4).T,
        torch.tensor([2**63 + 1], dtype=torch.uint64),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_tensors_of_any_dtype_and_layout_come_back(tmp_path: Path, tensor: torch.Tensor) -> None:
    tensors.write_tensors(tmp_path, {"t": tensor}, ())
    into = torch.zeros_like(tensor)
    tensors.read_tensors(tmp_path, {"t": into})
    raw = [one.contiguous().reshape(-1).view(torch.uint8).tolist() for one in (into, tensor)]
    assert raw[0] == raw[1]


def test_tied_tensors_are_written_under_both_names(tmp_path: Path) -> None:
    weight = torch.randn(4)
    tensors.write_tensors(tmp_path, {"a": weight, "b": weight, "c": weight[:2]}, ())
    into = {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(2)}
    tensors.read_tensors(tmp_path, into)
    assert torch.equal(into["a"], weight)
    assert torch.equal(into["b"], weight)
    assert torch.equal(into["c"], weight[:2])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_other_tools_read_the_tensors(tmp_path: Path) -> None:
    info = save(CheckpointStore(tmp_path), 5)
    into = empty_like(state_at(5))
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(info.path)), no_dist=True)
    assert torch.equal(into["optimizer.0.exp_avg"], state_at(5)["optimizer.0.exp_avg"])
    model = safetensors.torch.load_file(info.path / "model.safetensors")
    assert list(model) == ["model.weight"]
    index = json.loads((info.path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.weight"] == "model.safetensors"


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    info = save(CheckpointStore(tmp_path), 5)
    for path in info.path.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK")), path
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())  # noqa: S301


def test_the_model_is_exported_for_other_tools(tmp_path: Path) -> None:
    info = save(CheckpointStore(tmp_path), 5)
    target = tmp_path / "export.safetensors"
    tensors.export_model(info.path, target, prefix="model.", dtype=torch.float16)
    exported = safetensors.torch.load_file(target)
    assert list(exported) == ["weight"]
    assert torch.equal(exported["weight"], state_at(5)["model.weight"].half())
    with pytest.raises(CheckpointError, match="begins with 'no'"):
        tensors.export_model(info.path, target, prefix="no")


def test_only_what_was_asked_for_is_stored_in_half_precision_and_it_is_noted(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path)
    narrow = {"model.weight": torch.bfloat16, "model.count": torch.bfloat16}
    info = save(store, 5, storage_dtypes=narrow)
    assert info.rounded == {"model.weight": "float32"}
    into = empty_like(state_at(5))
    store.load(info, into)
    assert torch.equal(into["model.weight"], state_at(5)["model.weight"].bfloat16().float())
    for exact in ("model.count", "optimizer.0.exp_avg"):
        assert torch.equal(into[exact], state_at(5)[exact])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = [
    "manifest.json", "model.safetensors", "state.safetensors", "tree.bin", "rank-00001.bin",
    "model.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize("harm", [flip_a_bit, cut, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, harm
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    info = save(store, 2)
    harm(info.path / name)
    found, skipped = store.newest_valid()
    assert found is not None
    assert found.step == 1
    assert [one.path for one in skipped] == [str(info.path)]
    assert name.partition(".")[0] in skipped[0].reason
    with (
        pytest.raises(CheckpointError, match="is damaged")
        if name != "manifest.json"
        else (pytest.raises(CheckpointError, match="manifest"))
    ):
        store.load(info) if name != "manifest.json" else manifest.read(info.path)
    assert_holds(store, 1)


def test_the_cheap_check_sees_cuts_but_not_flipped_bits(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    info = save(store, 1)
    flip_a_bit(info.path / "tree.bin")
    assert store.newest_valid(full=False)[0] == info
    cut(info.path / "tree.bin")
    assert store.newest_valid(full=False)[0] is None


def test_a_half_written_checkpoint_is_passed_over_with_a_word(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.begin(2, 2).write_rank(0, b"only")
    found, skipped = store.newest_valid()
    assert found is not None
    assert found.step == 1
    assert [one.reason for one in skipped] == ["it was never finished"]


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 6):
        save(store, step)
    assert names_in(store) == ["step-000000004", "step-000000005"]


def test_the_only_sound_checkpoint_is_never_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    keeping_all = CheckpointStore(tmp_path, keep_last=9)
    for step in range(1, 5):
        save(keeping_all, step)
    for step in (2, 3, 4):
        flip_a_bit(store.folder / f"step-{step:09d}" / "state.safetensors")
    store.prune()
    assert_holds(store, 1)
    flip_a_bit(store.folder / "step-000000001" / "tree.bin")
    before = names_in(store)
    assert store.prune() == []
    assert names_in(store) == before


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        save(CheckpointStore(tmp_path, keep_last=9), step)
    cut(store.folder / "step-000000003" / "tree.bin")
    save(store, 4)
    assert names_in(store) == ["step-000000002", "step-000000003", "step-000000004"]


def test_two_writers_of_one_step_leave_two_sound_checkpoints(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path, keep_last=9) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda store=store: [save(store, step) for step in range(5)])
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_holds(stores[0], 4)
    for name in names_in(stores[0]):
        assert manifest.read(tmp_path / name).damage() is None


def test_a_folder_whose_writer_is_just_locking_it_is_not_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, asked = CheckpointStore(tmp_path), []

    def lock_after_a_prune(descriptor: int, operation: int) -> None:
        if not asked:
            asked.append(operation)
            other.prune()
        flock(descriptor, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock_after_a_prune)
    save(CheckpointStore(tmp_path), 1)
    assert asked
    assert_holds(other, 1)


def test_saving_a_step_again_makes_the_later_one_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 7)
    again = save(store, 7, world_size=3)
    assert again.path.name == "step-000000007.1"
    assert store.newest_valid()[0] == again


def test_more_ranks_than_were_saved_are_told_that_they_have_no_state(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    info = save(store, 1, world_size=2)
    assert info.ranks_without_state(4) == [2, 3]
    assert info.ranks_without_state(1) == []
    loaded = store.load(info)
    assert [loaded.rank_payload(rank) is None for rank in range(4)] == [False, False, True, True]


def test_a_rank_that_does_not_come_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, clock=FakeClock())
    staging = store.begin(1, 4)
    for rank in (0, 2):
        staging.write_rank(rank, b"")
    staging.write_replicated({}, b"")
    with pytest.raises(CheckpointError, match=r"lacks the state of ranks \[1, 3\] after 5 s"):
        staging.commit(timeout_s=5)
    assert names_in(store) == []
    with pytest.raises(CheckpointError, match="writing"):
        staging.write_rank(1, b"late")


def test_ranks_in_several_processes_meet_by_the_nonce(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    CheckpointStore(tmp_path).begin(3, 2, nonce="g4-3").write_rank(1, b"one")
    staging = store.begin(3, 2, nonce="g4-3")
    staging.write_rank(0, b"zero")
    staging.write_replicated({}, b"tree")
    loaded = store.load(staging.commit())
    assert [loaded.rank_payload(rank) for rank in (0, 1)] == [b"zero", b"one"]
    with pytest.raises(CheckpointError, match="nonce"):
        store.begin(3, 2, nonce="../../etc")


def test_what_a_living_process_is_staging_stays_and_what_a_dead_one_left_goes(
    tmp_path: Path,
) -> None:
    clock = FakeClock(start_s=os.stat(tmp_path).st_mtime)
    store = CheckpointStore(tmp_path, clock=clock)
    living = store.begin(1, 1, nonce="living")
    living.write_replicated({}, b"")
    dead = store.begin(2, 1, nonce="dead")
    (dead.path / ".lock").touch()
    store.begin(3, 1, nonce="early")
    assert [path.name.partition(".del")[0] for path in store.prune()] == ["step-000000002.tmp-dead"]
    assert names_in(store) == ["step-000000001.tmp-living", "step-000000003.tmp-early"]
    clock.advance(7200)
    assert [path.name for path in store.prune()] == ["step-000000003.tmp-early"]
    living.write_rank(0, b"")
    living.commit()
    assert names_in(store) == ["step-000000001"]


def test_two_processes_cannot_commit_the_same_staged_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first, second = (store.begin(1, 1, nonce="same") for _ in range(2))
    first.write_replicated({}, b"")
    with pytest.raises(CheckpointError, match="another process"):
        second.write_replicated({}, b"")
    with pytest.raises(BlockingIOError), (first.path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ({"model.other": torch.zeros(1)}, "no tensor model.other"),
        ({"model.weight": torch.zeros(64, 4)}, r"shape \(64, 4\), and \(64, 3\)"),
    ],
)
def test_state_that_does_not_fit_is_refused_untouched(
    tmp_path: Path, into: dict[str, torch.Tensor], message: str
) -> None:
    store = CheckpointStore(tmp_path)
    info = save(store, 1)
    into["model.count"] = torch.tensor(-1)
    with pytest.raises(CheckpointError, match=message):
        store.load(info, into)
    assert into["model.count"] == -1


def test_a_folder_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="hint: check that the folder exists"):
        CheckpointStore(tmp_path / "file").begin(1, 1)
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_a_manifest_of_another_format_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    save(store, 1)
    monkeypatch.undo()
    found, skipped = store.newest_valid()
    assert found is None
    assert "format 2" in skipped[0].reason
