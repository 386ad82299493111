import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from trainonce.checkpoint.saver import AsyncSaver, young_interval_s
from trainonce.checkpoint.store import CheckpointStore
from trainonce.errors import CheckpointError

if TYPE_CHECKING:
    from trainonce.events import CheckpointSaved


def test_what_changes_after_save_returned_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = {"w": torch.arange(1000.0), "half": torch.ones(3, dtype=torch.bfloat16)}
    reported: list[CheckpointSaved] = []
    saver = AsyncSaver(store, on_saved=reported.append)
    saver.save(
        1, rank=0, world_size=2, nonce="a", rank_payload=b"zero", state=state, tree=b"t",
        reason="interval",
    )  # fmt: skip
    state["w"].zero_()
    assert saver.busy  # it waits for the other rank
    other = AsyncSaver(store)
    other.save(1, rank=1, world_size=2, nonce="a", rank_payload=b"one")
    assert other.wait() is None
    saved = saver.wait()
    assert reported == [saved]
    assert saved is not None
    info, _ = store.newest_valid()
    assert info is not None
    assert (saved.step, saved.path, saved.size_bytes) == (1, str(info.path), info.size_bytes)
    assert saved.blocked_s >= 0
    assert saved.write_s > 0
    into = {"w": torch.zeros(1000)}
    assert store.load(info, into).rank_payload(1) == b"one"
    assert torch.equal(into["w"], torch.arange(1000.0))


def test_buffers_are_used_again_and_can_be_released(tmp_path: Path) -> None:
    saver = AsyncSaver(CheckpointStore(tmp_path))
    state = {"w": torch.zeros(10)}
    addresses: list[int] = []
    for step in range(3):
        state["w"].fill_(step)
        saver.save(step, rank=0, world_size=1, nonce=str(step), rank_payload=b"", state=state)
        addresses.append(saver._buffers["w"].data_ptr())
    assert len(set(addresses)) == 1
    saver.release()
    assert saver._buffers == {}
    info, _ = saver.store.newest_valid()
    assert info is not None
    assert info.step == 2


def test_a_failed_save_is_told_once_and_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    saver = AsyncSaver(store, timeout_s=0.0)
    saver.save(1, rank=0, world_size=2, nonce="a", rank_payload=b"", state={"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"lacks the state of ranks \[1\]"):
        saver.wait()
    assert saver.wait() is None
    assert list(tmp_path.iterdir()) == []
    saver.save(2, rank=0, world_size=1, nonce="b", rank_payload=b"", state={"w": torch.ones(2)})
    saved = saver.wait()
    assert saved is not None
    assert saved.step == 2


def test_a_tensor_that_has_no_form_in_a_file_is_an_error_not_a_dead_thread(
    tmp_path: Path,
) -> None:
    saver = AsyncSaver(CheckpointStore(tmp_path))
    saver.save(
        1, rank=0, world_size=1, nonce="a", rank_payload=b"", state={"w": torch.ones(2)},
        storage_dtypes={"w": torch.quint8},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="could not be written"):
        saver.wait()
    assert not [each for each in threading.enumerate() if each.name.startswith("checkpoint-")]
    assert list(tmp_path.iterdir()) == []


def test_youngs_interval() -> None:
    assert young_interval_s(2.0, 3600.0) == math.sqrt(2 * 2.0 * 3600.0) == 120.0
    assert young_interval_s(0.0, 3600.0, write_s=30.0) == 30.0
    for arguments in [(-1.0, 10.0), (1.0, 0.0), (1.0, math.nan)]:
        with pytest.raises(CheckpointError, match="no interval"):
            young_interval_s(*arguments)
