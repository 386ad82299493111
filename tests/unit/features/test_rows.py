"""The row store: what is put is found, what is damaged is missing, nothing is ever wrong."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainonce.errors import StateMismatchError, StoreError
from trainonce.graph.features.arena import Arena, aligned_rows
from trainonce.graph.features.buffers import Buffers
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.segments import Column, Rows

FLAT = (Column("", "float32", (6,)),)


def names(*numbers: int) -> np.ndarray:
    return np.array([b"sample-%08d" % number for number in numbers], "S16")


def flat_rows(*numbers: int) -> Rows:
    values = torch.stack([torch.arange(6.0) + 100 * number for number in numbers])
    return Rows(names(*numbers), FLAT, (values,))


def segment_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.rows"))


def test_rows_are_found_by_their_samples_after_reopening(tmp_path):
    RowTable(tmp_path, "graph").put(flat_rows(3, 1, 2))
    table = RowTable(tmp_path, "graph")
    slots = table.locate(names(1, 2, 9, 3))
    assert slots[2] == -1
    found = slots[[0, 1, 3]]
    assert len(table.damaged(found)) == 0
    assert torch.equal(table.take(found)[0], flat_rows(1, 2, 3).values[0])


def test_rows_of_many_segments_are_one_array(tmp_path):
    table = RowTable(tmp_path, "graph")
    for start in range(0, 60, 3):
        table.put(flat_rows(start, start + 1, start + 2))
    order = np.random.default_rng(0).permutation(60)
    slots = table.locate(names(*order))
    assert torch.equal(table.take(slots)[0], flat_rows(*order).values[0])


def test_another_table_sees_rows_when_it_looks_again(tmp_path):
    reader = RowTable(tmp_path, "graph")
    RowTable(tmp_path, "graph").put(flat_rows(1))
    assert reader.locate(names(1))[0] == -1
    reader.refresh()
    assert reader.locate(names(1))[0] >= 0


def test_of_two_rows_of_one_sample_the_first_committed_serves(tmp_path):
    RowTable(tmp_path, "graph").put(flat_rows(1))
    other = Rows(names(1), FLAT, (torch.full((1, 6), 7.0),))
    RowTable(tmp_path, "graph").put(other)
    table = RowTable(tmp_path, "graph")
    assert torch.equal(table.take(table.locate(names(1)))[0], flat_rows(1).values[0])


def test_every_kind_of_column_comes_back_as_it_was(tmp_path):
    columns = (
        Column("half", "float16", (3,)),
        Column("brain", "bfloat16", (2, 2)),
        Column("count", "int64", ()),
        Column("flag", "bool", ()),
        Column("empty", "float32", (0,)),
        Column("words", "float32", (2,), ragged=True),
    )
    values = (
        torch.randn(3, 3).half(),
        torch.randn(3, 2, 2).bfloat16(),
        torch.tensor([5, -1, 2]),
        torch.tensor([True, False, True]),
        torch.empty(3, 0),
        [torch.randn(4, 2), torch.randn(0, 2), torch.randn(1, 2)],
    )
    RowTable(tmp_path, "graph").put(Rows(names(0, 1, 2), columns, values))
    table = RowTable(tmp_path, "graph")
    slots = table.locate(names(2, 0, 1))
    assert len(table.damaged(slots)) == 0
    for column, put, got in zip(columns, values, table.take(slots), strict=True):
        for place, original in enumerate((2, 0, 1)):
            assert got[place].dtype is column.torch_dtype
            assert torch.equal(got[place], put[original]), column.name


def test_long_rows_of_odd_length_are_padded_and_come_back_whole(tmp_path):
    length = (1 << 18) + 1
    values = torch.randn(3, length)
    columns = (Column("", "float32", (length,)),)
    RowTable(tmp_path, "graph").put(Rows(names(0, 1, 2), columns, (values,)))
    table = RowTable(tmp_path, "graph")
    slots = table.locate(names(1, 2))
    assert len(table.damaged(slots)) == 0
    assert torch.equal(table.take(slots)[0], values[1:])


def test_a_flipped_bit_anywhere_makes_rows_missing_and_never_wrong(tmp_path):
    """Every 97th bit of a whole segment, one at a time."""
    columns = (Column("a", "float32", (3,)), Column("r", "int64", (), ragged=True))
    ragged = [torch.tensor([1, 2]), torch.tensor([3])]
    rows = Rows(names(1, 2), columns, (torch.randn(2, 3), ragged))
    RowTable(tmp_path, "graph").put(rows)
    (path,) = segment_files(tmp_path)
    whole = path.read_bytes()
    noticed = 0
    used = [place for place in range(len(whole)) if whole[place]] + [len(whole) - 1]
    for place in used:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            table = RowTable(tmp_path, "graph")
        except StoreError:
            noticed += 1
            continue
        slots = table.locate(names(1, 2))
        bad = table.damaged(slots[slots >= 0])
        noticed += (slots < 0).any() or len(bad) > 0
        for row, slot in enumerate(table.locate(names(1, 2))):
            if slot >= 0:
                got = table.take(np.array([slot]))
                assert torch.equal(got[0][0], rows.values[0][row])
                assert torch.equal(got[1][0], ragged[row])
    # The last byte is padding; every byte that says something was checked.
    assert noticed >= len(used) - 1


@pytest.mark.parametrize("keep", [0, 7, 40, 5000, 70000])
def test_a_truncated_segment_counts_as_missing(tmp_path, keep):
    RowTable(tmp_path, "graph").put(flat_rows(1, 2))
    (path,) = segment_files(tmp_path)
    os.truncate(path, keep)
    table = RowTable(tmp_path, "graph")
    assert (table.locate(names(1, 2)) == -1).all()
    table.put(flat_rows(1, 2))
    assert (table.locate(names(1, 2)) >= 0).all()


def test_a_damaged_row_is_replaced_by_one_that_is_put_again(tmp_path):
    RowTable(tmp_path, "graph").put(flat_rows(1, 2))
    (path,) = segment_files(tmp_path)
    data = bytearray(path.read_bytes())
    place = data.index(flat_rows(1).values[0].numpy().tobytes())
    data[place + 5] ^= 4
    path.write_bytes(data)
    table = RowTable(tmp_path, "graph")
    assert len(table.damaged(table.locate(names(1, 2)))) == 1
    assert (table.locate(names(1, 2)) == -1).tolist() == [True, False]
    table.put(flat_rows(1))
    for again in (table, RowTable(tmp_path, "graph")):
        again.damaged(again.locate(names(1, 2)))
        slots = again.locate(names(1, 2))
        assert torch.equal(again.take(slots)[0], flat_rows(1, 2).values[0])


def test_verify_always_notices_damage_after_the_first_read(tmp_path):
    RowTable(tmp_path, "graph").put(flat_rows(1))
    (path,) = segment_files(tmp_path)
    once = RowTable(tmp_path, "graph")
    always = RowTable(tmp_path, "graph", verify="always")
    for table in (once, always):
        assert len(table.damaged(table.locate(names(1)))) == 0
    with open(path, "r+b") as file:
        place = path.read_bytes().index(flat_rows(1).values[0].numpy().tobytes())
        file.seek(place + 5)
        file.write(b"\xff")
    assert len(once.damaged(once.locate(names(1)))) == 0
    assert len(always.damaged(always.locate(names(1)))) == 1


def test_rows_of_another_layout_are_refused(tmp_path):
    table = RowTable(tmp_path, "graph")
    table.put(flat_rows(1))
    other = Rows(names(2), (Column("", "float32", (5,)),), (torch.zeros(1, 5),))
    with pytest.raises(StateMismatchError, match="ragged"):
        table.put(other)


def test_a_segment_of_another_subgraph_is_not_used(tmp_path):
    RowTable(tmp_path / "a", "one graph").put(flat_rows(1))
    (tmp_path / "a").rename(tmp_path / "b")
    assert RowTable(tmp_path / "b", "another graph").locate(names(1))[0] == -1


def test_a_segment_of_a_newer_format_stops_with_a_hint(tmp_path):
    RowTable(tmp_path, "graph").put(flat_rows(1))
    (path,) = segment_files(tmp_path)
    path.write_bytes(b"TROWSEG9" + path.read_bytes()[8:])
    with pytest.raises(StoreError, match="newer trainonce"):
        RowTable(tmp_path, "graph")


def test_a_store_that_cannot_be_written_keeps_rows_in_memory(tmp_path, caplog):
    blocker = tmp_path / "file"
    blocker.write_bytes(b"")
    table = RowTable(blocker / "store", "graph")
    assert table.put(flat_rows(1, 2)) is False
    assert table.put(flat_rows(3)) is False
    assert table.volatile_rows == 3
    assert "cannot be written" in caplog.text
    slots = table.locate(names(3, 1))
    assert len(table.damaged(slots)) == 0
    assert torch.equal(table.take(slots)[0], flat_rows(3, 1).values[0])


def test_leftovers_of_dead_writers_are_swept_away(tmp_path):
    table = RowTable(tmp_path, "graph")
    (tmp_path / ".tmp-0123").write_bytes(b"half a segment")
    table.put(flat_rows(1))
    assert not list(tmp_path.glob(".tmp-*"))


def test_rows_stay_readable_when_their_file_is_removed(tmp_path):
    table = RowTable(tmp_path, "graph")
    table.put(flat_rows(1))
    for path in segment_files(tmp_path):
        path.unlink()
    assert torch.equal(table.take(table.locate(names(1)))[0], flat_rows(1).values[0])


def test_views_outlive_the_arena_that_made_them():
    arena = Arena(16, 4)
    fd = os.memfd_create("rows")
    os.ftruncate(fd, 4096)
    os.pwrite(fd, bytes(range(64)), 0)
    arena.map_rows(fd, offset=0, slot=0, num_rows=4)
    os.close(fd)
    view = arena.rows()
    del arena
    assert view.reshape(-1).tolist() == list(range(64))


def test_rows_that_do_not_fit_an_arena_are_refused():
    arena = Arena(4096, 2)
    fd = os.memfd_create("rows")
    os.ftruncate(fd, 3 * 4096)
    try:
        with pytest.raises(ValueError, match="do not fit"):
            arena.map_rows(fd, offset=0, slot=0, num_rows=3)
        with pytest.raises(ValueError, match="do not fit"):
            arena.map_rows(fd, offset=100, slot=0, num_rows=1)
    finally:
        os.close(fd)


@given(st.integers(1, 1 << 20))
def test_aligned_rows_are_whole_pages(stride):
    import mmap

    assert aligned_rows(stride) * stride % mmap.PAGESIZE == 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True), max_size=8))
def test_any_history_of_puts_serves_the_first_row_of_each_sample(tmp_path_factory, history):
    """A model-based test: a dict that keeps the first value put under each sample."""
    folder = tmp_path_factory.mktemp("rows")
    model: dict[int, float] = {}
    writers = [RowTable(folder, "graph"), RowTable(folder, "graph")]
    for turn, numbers in enumerate(history):
        values = torch.full((len(numbers), 6), float(turn))
        writers[turn % 2].put(Rows(names(*numbers), FLAT, (values,)))
        for number in numbers:
            model.setdefault(number, float(turn))
    table = RowTable(folder, "graph")
    slots = table.locate(names(*range(41)))
    assert {number for number in range(41) if slots[number] >= 0} == set(model)
    for number, turn in model.items():
        assert (table.take(slots[[number]])[0] == turn).all()


def test_column_properties_survive_pickling():
    column = Column("a", "float16", (4,))
    assert column.stride == 8
    assert pickle.loads(pickle.dumps(column)) == column  # noqa: S301 - our own bytes


def test_batches_that_are_still_held_are_never_overwritten(tmp_path):
    columns = (Column("", "float32", (4096,)),)
    values = torch.arange(64.0)[:, None].expand(64, 4096).clone()
    table = RowTable(tmp_path, "graph")
    table.put(Rows(names(*range(64)), columns, (values,)))
    slots = table.locate(names(*range(64)))
    held = []
    for start in range(0, 64, 8):
        batch = table.take(slots[start : start + 8])[0]
        # What is held on to: the batch, a view of it, an array that shares its memory, nothing.
        held.append((start, [batch, batch[3:], batch.numpy(), None][start // 8 % 4]))
        del batch
    for start, part in held:
        if part is not None:
            wanted = values[start + 3 : start + 8] if len(part) == 5 else values[start : start + 8]
            assert torch.equal(torch.as_tensor(part), wanted)


def test_buffers_come_back_when_nobody_holds_them():
    buffers = Buffers(np.dtype("f4"), (4096,), max_free=1)
    first = buffers.lend(8)
    address = first.ctypes.data
    second = buffers.lend(8)
    assert second.ctypes.data != address
    del first
    assert buffers.lend(8).ctypes.data == address
    del second
    assert buffers.lend(4).shape == (4, 4096), "another batch size gets another buffer"
