"""Rows are reached by `trainonce graph`: listed, explained, checked, evicted, forgotten."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset

import trainonce as once
from trainonce.cli import main
from trainonce.errors import ConfigError, DataError
from trainonce.graph import upkeep
from trainonce.graph.features import tables

DATA = torch.arange(40 * 6.0).view(40, 6)


def compute(encoder, store, data=DATA, **options):
    return once.features(encoder, data, batch_size=8, store=store, **options)


def run(capsys, store, *arguments):
    code = main.main(["graph", *arguments, "--store", str(store)])
    return code, capsys.readouterr().out


def test_tables_are_listed_shown_and_explained_part_by_part(encoder, tmp_path, capsys):
    rows = compute(encoder, tmp_path)
    key = rows.fingerprint.digest
    with torch.no_grad():
        encoder.weight += 1
    other = compute(encoder, tmp_path).fingerprint.digest
    code, out = run(capsys, tmp_path, "ls")
    assert code == 0
    assert out.count("features(Counting), 40 rows") == 2
    assert f"subgraph {key}" in run(capsys, tmp_path, "show", key[:12])[1]
    _, out = run(capsys, tmp_path, "why", other[:12], "--json")
    found = json.loads(out)
    assert found["nearest"] == key
    assert [change["field"] for change in found["changes"]] == ["weights"]
    assert "weights changed" in run(capsys, tmp_path, "why", "features(Counting)")[1]


def test_a_store_may_be_given_and_a_tenants_rows_are_its_own(encoder, tmp_path, capsys):
    plain = once.open_store(tmp_path)
    tenants = [once.open_store(tmp_path, tenant=name) for name in ("a", "b")]
    assert compute(encoder, plain).report.computed == 40
    assert compute(encoder, tmp_path).report.hits == 40
    for tenant in tenants:
        assert compute(encoder, tenant).report.computed == 40
        assert compute(encoder, tenant).report.hits == 40
        assert upkeep.rows_folder(tenant).is_relative_to(tenant.root)
    out = run(capsys, tmp_path, "ls", "--tenant", "a")[1]
    assert "features(Counting), 40 rows" in out
    assert str(tenants[0].root) in out
    sample = compute(encoder, tenants[0]).digests[3].ljust(16, b"\0").hex()
    assert run(capsys, tmp_path, "forget", "--sample", sample, "--tenant", "a")[0] == 0
    with pytest.raises(DataError, match="forgotten"):
        compute(encoder, once.open_store(tmp_path, tenant="a"))
    assert compute(encoder, tenants[1]).report.hits == 40
    with pytest.raises(ConfigError, match="open for reading only"):
        compute(encoder, once.open_store(tmp_path, read_only=True))


def test_verify_finds_a_flipped_bit_in_a_row_and_removes_that_row_only(encoder, tmp_path, capsys):
    rows = compute(encoder, tmp_path)
    expected = rows.batch(range(40))
    once.open_store(tmp_path).close()
    row = expected[3].numpy().tobytes()
    files = (tmp_path / "rows" / rows.fingerprint.digest[:40]).glob("*.rows")
    (path,) = [file for file in files if row in file.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(row) + 5] ^= 4
    path.write_bytes(data)
    code, out = run(capsys, tmp_path, "verify", "--json")
    assert code == 1
    found = json.loads(out)
    assert found["rows"] >= 40
    assert [text.endswith(": 1 rows") for text in found["damaged"]] == [True]
    assert json.loads(run(capsys, tmp_path, "verify", "--json")[1])["damaged"] == []
    again = compute(encoder, tmp_path)
    assert (again.report.hits, again.report.computed) == (39, 1)
    assert torch.equal(again.batch(range(40)), expected)


def test_the_budget_of_a_store_holds_for_rows_too(encoder, tmp_path, capsys):
    rows = compute(encoder, tmp_path)
    once.open_store(tmp_path).close()
    assert tables.tables(tmp_path / "rows")[0].size_bytes > 0
    code, out = run(capsys, tmp_path, "gc", "--budget", "0", "--json")
    done = json.loads(out)
    assert (code, done["left_bytes"]) == (0, 0)
    assert done["segments"] >= 1
    assert torch.equal(rows.batch([1]), encoder(DATA[1:2]).detach())  # still mapped
    assert compute(encoder, tmp_path).report.computed == 40


def test_a_forgotten_sample_is_erased_with_all_that_was_computed_from_it(encoder, tmp_path, capsys):
    rows = compute(encoder, tmp_path)
    head = nn.Linear(4, 3).eval()
    chained = compute(head, tmp_path, rows)
    victim = rows.digests[7].ljust(16, b"\0").hex()
    once.open_store(tmp_path).close()
    code, out = run(capsys, tmp_path, "forget", "--sample", victim, "--json")
    done = json.loads(out)
    assert (code, done["rows"], done["left"]) == (0, 2, 0)  # its row, and the row of that
    with pytest.raises(DataError, match=r"1 samples were forgotten on request.*: 7\n"):
        compute(encoder, tmp_path)
    rest = [place for place in range(40) if place != 7]
    kept = compute(encoder, tmp_path, Subset(TensorDataset(DATA), rest))
    assert kept.report.computed == 0
    again = compute(head, tmp_path, kept)
    assert again.report.computed == 0
    assert torch.equal(again.batch(range(39))[0], chained.batch(rest))


class Folder:
    """Laid out as torchvision's image folders are."""

    def __init__(self, paths):
        self.samples = [(str(path), number) for number, path in enumerate(paths)]
        self.loader = load

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, target = self.samples[index]
        return self.loader(path), target


def load(path):
    return torch.from_numpy(np.asarray(Image.open(path), np.float32).reshape(-1)[:6])


def test_forgetting_a_file_erases_rows_and_labels_of_its_image(encoder, tmp_path, capsys):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((2, 3), number, np.uint8)).save(path)
    store = tmp_path / "store"
    compute(encoder, store, Folder(paths))
    once.open_store(store).close()
    code, out = run(capsys, store, "forget", "--source", str(paths[2]), "--json")
    done = json.loads(out)
    assert (code, done["rows"], done["left"]) == (0, 2, 0)  # features and label
    with pytest.raises(DataError, match="forgotten on request"):
        compute(encoder, store, Folder(paths))
    assert compute(encoder, store, Folder([*paths[:2], paths[3]])).report.computed == 0


def test_a_row_that_comes_late_is_not_kept_once_its_sample_is_forgotten(encoder, tmp_path):
    rows = compute(encoder, tmp_path)
    store = once.open_store(tmp_path)
    upkeep.forget(store, samples=[rows.digests[0].ljust(16, b"\0").hex()])
    table = rows._table
    late = SimpleNamespace(before=len(os.listdir(table.folder)))
    fresh = rows._engine.rows(rows.digests[:1], [0])
    assert table.put(fresh)
    assert len(os.listdir(table.folder)) == late.before


def chain(encoder, store):
    """Rows of a module on rows of another; returns both."""
    rows = compute(encoder, store)
    made = once.features(nn.Linear(4, 2).eval(), rows, batch_size=8, store=store)
    once.open_store(store).close()
    return rows, made


def test_damaged_notes_beside_the_rows_stop_no_command(encoder, tmp_path, capsys):
    rows = compute(encoder, tmp_path)
    once.open_store(tmp_path).close()
    folder = tmp_path / "rows" / rows.fingerprint.digest[:40]
    for name in ("cost.json", "about.json"):
        for text in ('{"sebonds": 1, "rows": 3}', '{"parts": 3, "seconds": "x", "rows": 1}', "{"):
            (folder / name).write_text(text)
            for command in (("ls",), ("gc",), ("verify",)):
                assert run(capsys, tmp_path, *command)[0] == 0
    assert compute(encoder, tmp_path).report.computed == 0


def test_damage_in_what_tells_lineage_is_found_and_said(encoder, tmp_path, capsys):
    rows, _ = chain(encoder, tmp_path)
    (path,) = (tmp_path / "rows" / tables.LINEAGE).glob("*.pairs")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    sample = rows.digests[3].ljust(16, b"\0").hex()
    code, out = run(capsys, tmp_path, "forget", "--sample", sample)
    assert code == 1
    assert f"lineage {path.name}" in out
    assert run(capsys, tmp_path, "verify")[0] == 1
    assert run(capsys, tmp_path, "verify")[0] == 0


def test_a_flipped_bit_brings_no_forgotten_sample_back(encoder, tmp_path):
    rows = compute(encoder, tmp_path)
    upkeep.forget(once.open_store(tmp_path), samples=[rows.digests[3].ljust(16, b"\0").hex()])
    path = tmp_path / "rows" / tables.FORGOTTEN
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        assert np.isin(rows.digests[3], tables.forgotten(tmp_path / "rows"))
