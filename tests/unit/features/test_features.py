"""`features`: rows are what the module computes, and each is computed once."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from trainonce.errors import ConfigError, DataError, StateMismatchError, StoreError
from trainonce.events import ComputeSaved
from trainonce.graph.features.compute import compare
from trainonce.graph.features.evaluate import features
from trainonce.graph.features.segments import Column, Rows

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(50)
DATA = TensorDataset(X, Y)


def segments_of(store):
    return sorted(path for path in store.rglob("*.rows") if len(path.parent.name) == 40)


def damage(store, value):
    """Flip a bit of the row with this value; return whether it was found."""
    for path in segments_of(store):
        data = bytearray(path.read_bytes())
        place = data.find(value.detach().numpy().tobytes())
        if place >= 0:
            data[place] ^= 1
            path.write_bytes(data)
            return True
    return False


def test_rows_stand_where_the_inputs_stood_and_labels_pass_through(encoder, tmp_path):
    rows = features(encoder, DATA, batch_size=16, store=tmp_path)
    assert len(rows) == 50
    assert rows.report.computed == 50
    feature, label = rows[7]
    torch.testing.assert_close(feature, encoder(X)[7].detach())
    assert label == 7
    assert rows[-1][1] == 49
    with pytest.raises(IndexError):
        rows[50]


def test_a_loader_yields_one_contiguous_batch(encoder, tmp_path):
    rows = features(encoder, DATA, batch_size=16, store=tmp_path)
    loader = DataLoader(rows, batch_size=20, shuffle=True, collate_fn=rows.collate)
    seen = []
    for batch, labels in loader:
        assert batch.is_contiguous()
        torch.testing.assert_close(batch, encoder(X[labels]).detach())
        seen += labels.tolist()
    assert sorted(seen) == list(range(50))


def test_any_other_collate_and_worker_processes_see_the_same(encoder, tmp_path):
    rows = features(encoder, DATA, batch_size=16, store=tmp_path)
    (plain,) = DataLoader(rows, batch_size=50)
    (ours,) = DataLoader(rows, batch_size=50, collate_fn=rows.collate)
    (forked,) = DataLoader(
        rows, batch_size=50, collate_fn=rows.collate, num_workers=1, multiprocessing_context="fork"
    )
    for other in (plain, forked):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_the_second_run_computes_nothing(encoder, tmp_path):
    features(encoder, DATA, batch_size=16, store=tmp_path)
    events = []
    rows = features(encoder, DATA, batch_size=16, store=tmp_path, sink=events.append)
    assert (rows.report.computed, rows.report.hits, rows.report.num_batches) == (0, 50, 0)
    (event,) = events
    assert isinstance(event, ComputeSaved)
    assert event.saved_s > 0


def test_only_new_samples_are_computed_and_datasets_share_rows(encoder, tmp_path):
    features(encoder, Subset(DATA, range(30)), batch_size=16, store=tmp_path)
    grown = features(encoder, DATA, batch_size=16, store=tmp_path)
    assert (grown.report.hits, grown.report.computed) == (30, 20)
    both = ConcatDataset([TensorDataset(X[:5], Y[:5]), TensorDataset(X[40:], Y[40:])])
    for same in (both, X.numpy(), X, (X, Y), {"x": X, "y": Y}):
        inputs = "x" if isinstance(same, dict) else None
        rows = features(encoder, same, inputs=inputs, batch_size=16, store=tmp_path)
        assert rows.report.computed == 0
    assert sorted(rows[3]) == ["features", "y"]
    assert features(encoder, both, store=tmp_path)[5][1] == 40


def test_equal_samples_are_computed_once(encoder, tmp_path):
    twice = TensorDataset(torch.cat([X, X]), torch.arange(100))
    rows = features(encoder, twice, batch_size=10, store=tmp_path)
    assert rows.report.num_batches == 5
    assert torch.equal(rows[3][0], rows[53][0])
    assert rows[53][1] == 53


def test_rows_of_one_module_feed_the_next(encoder, tmp_path):
    head = nn.Linear(4, 2).eval()
    chained = features(head, features(encoder, DATA, store=tmp_path), store=tmp_path)
    torch.testing.assert_close(chained[9][0], head(encoder(X))[9].detach())
    assert chained[9][1] == 9
    batch, labels = chained.batch([3, 4])
    assert batch.shape == (2, 2)
    assert labels.tolist() == [3, 4]
    again = features(head, features(encoder, DATA, store=tmp_path), store=tmp_path)
    assert again.report.computed == 0
    encoder.weight.data.add_(1)
    moved = features(head, features(encoder, DATA, store=tmp_path), store=tmp_path)
    assert moved.report.computed == 50


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.weight.data.mul_(1.5),
        lambda module: module.double(),
        lambda module: setattr(module, "forward", None),
    ],
    ids=["weights", "dtype", "another module"],
)
def test_a_change_recomputes_and_never_serves_what_is_stale(encoder, tmp_path, change):
    features(encoder, DATA, store=tmp_path)
    if encoder.weight.dtype == torch.float32:
        change(encoder)
    data = DATA
    if encoder.weight.dtype == torch.float64:
        data = TensorDataset(X.double(), Y)
    if encoder.forward is None:
        encoder = nn.Linear(6, 4)
    rows = features(encoder, data, store=tmp_path)
    assert rows.report.hits == 0
    torch.testing.assert_close(rows.batch(range(50))[0], encoder(data.tensors[0]).detach())


def test_a_changed_buffer_recomputes(tmp_path):
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    features(net, X, store=tmp_path)
    net[1].running_mean.add_(1)
    rows = features(net, X, store=tmp_path)
    assert rows.report.computed == 50
    torch.testing.assert_close(rows[0], net(X)[0].detach())


def test_the_storage_dtype_is_part_of_the_key(encoder, tmp_path):
    exact = features(encoder, X, store=tmp_path)
    half = features(encoder, X, store=tmp_path, storage_dtype=torch.float16)
    assert half.report.computed == 50
    assert half[0].dtype is torch.float16
    assert exact[0].dtype is torch.float32
    brain = features(encoder, X, store=tmp_path, storage_dtype=torch.bfloat16)
    torch.testing.assert_close(brain[3].float(), exact[3], rtol=1e-2, atol=1e-2)


def test_outputs_may_be_dicts_tuples_chosen_or_ragged(tmp_path):
    class Many(nn.Module):
        def forward(self, x):
            lengths = (x[:, 0] > 0).long() + 2
            return {"wide": x * 2, "tokens": x.unflatten(1, (3, 2)), "lengths": lengths}

    everything = features(Many(), DATA, store=tmp_path, ragged={"tokens": "lengths"})
    sample, label = everything[4]
    assert label == 4
    assert torch.equal(sample["wide"], X[4] * 2)
    assert sample["tokens"].shape == (int(sample["lengths"]), 2)
    batch, _ = everything.batch([0, 1, 2])
    assert [len(row) for row in batch["tokens"]] == batch["lengths"].tolist()
    assert torch.equal(features(Many(), X, outputs="wide", store=tmp_path)[0], X[0] * 2)
    two = features(Many(), X, outputs=["wide", "lengths"], store=tmp_path)
    assert sorted(two[0]) == ["lengths", "wide"]
    function = features(Many(), X, outputs=lambda out: out["wide"] + 1, store=tmp_path)
    assert torch.equal(function[0], X[0] * 2 + 1)


def test_ragged_rows_feed_the_next_module_by_a_collate_that_pads(tmp_path):
    class Tokens(nn.Module):
        def forward(self, x):
            return {"tokens": x.unflatten(1, (3, 2)), "lengths": (x[:, 0] > 0).long() + 2}

    class Pool(nn.Module):
        def forward(self, tokens):
            return tokens.sum(1)

    def tokens(sample):
        return sample[0]["tokens"]

    def padded(rows):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    ragged = features(Tokens(), DATA, store=tmp_path, ragged={"tokens": "lengths"})
    assert len({len(tokens(ragged[i])) for i in range(len(ragged))}) == 2
    with pytest.raises(
        DataError, match=r"(?s)cannot be joined.*hint: give features\(.*one that pads"
    ):
        features(Pool(), ragged, inputs=tokens, store=tmp_path, batch_size=8)
    pooled = features(Pool(), ragged, inputs=tokens, collate=padded, store=tmp_path, batch_size=8)
    values = pooled.batch(range(len(ragged)))
    values = values[0] if isinstance(values, (tuple, list)) else values
    assert torch.equal(values, torch.stack([tokens(ragged[i]).sum(0) for i in range(len(ragged))]))


def test_inputs_pick_arguments_by_key_name_and_function(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b):
            return a - b

    data = {"left": X, "right": X.flip(0), "label": Y}
    wanted = X - X.flip(0)
    for inputs in (["left", "right"], {"b": "right", "a": "left"}):
        rows = features(Two(), data, inputs=inputs, store=tmp_path)
        assert torch.equal(rows[2]["features"], wanted[2])
        assert rows[2]["label"] == 2
    rows = features(Two(), data, inputs={"a": "right", "b": "left"}, store=tmp_path)
    assert torch.equal(rows[2]["features"], -wanted[2]), "names decide, not the order"
    named = {"b": "right", "a": "left"}
    rows = features(Two(), data, inputs=named, outputs=lambda found: found + 1, store=tmp_path)
    assert torch.equal(rows[2]["features"], wanted[2] + 1)
    assert rows.report.proof.startswith("export")
    with pytest.raises(DataError, match="'missing'"):
        features(Two(), data, inputs=["missing"], store=tmp_path)
    with pytest.raises(DataError, match="which item"):
        features(Two(), [{"a": X[0]}], store=tmp_path)


def test_the_last_batch_is_filled_up_so_that_all_rows_have_one_batch_size(tmp_path):
    sizes = []

    class Seen(nn.Module):
        def forward(self, x):
            if type(x.shape[0]) is int:
                sizes.append(x.shape[0])
            return x * 1

    rows = features(Seen(), X, batch_size=16, store=tmp_path, version="1")
    assert rows.report.num_batches == 10, "6 calls compare rows, where the graph is declared"
    assert set(sizes) == {16}


def test_a_module_that_mixes_samples_is_refused(tmp_path):
    class Mixing(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    with pytest.raises(StateMismatchError, match="depends on the other samples"):
        features(Mixing(), X, batch_size=16, store=tmp_path)


def test_a_module_whose_python_looks_at_the_whole_batch_is_refused(tmp_path):
    class Choosing(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    data = torch.cat([torch.full((8, 6), -1.0), torch.full((8, 6), 2.0)])
    with pytest.raises(StateMismatchError, match="depends on the other samples"):
        features(Choosing(), data, batch_size=16, store=tmp_path, version="1")


def test_outputs_without_one_entry_a_sample_are_refused(tmp_path):
    class Summing(nn.Module):
        def forward(self, x):
            return x.sum(0)

    with pytest.raises(DataError, match="not one entry a sample"):
        features(Summing(), X, batch_size=16, store=tmp_path)


def test_randomness_hidden_from_the_graph_is_refused(tmp_path):
    class Hidden(nn.Module):
        def forward(self, x):
            return x + float(np.random.rand())

    with pytest.raises(DataError, match="random numbers"):
        features(Hidden(), X, store=tmp_path, version="1")


def test_a_damaged_row_is_computed_again_and_never_wrong(encoder, tmp_path):
    wanted = features(encoder, DATA, store=tmp_path).batch(range(50))[0]
    assert damage(tmp_path, wanted[11])
    rows = features(encoder, DATA, store=tmp_path)
    torch.testing.assert_close(rows.batch(range(50))[0], wanted)
    assert rows._table.damaged_rows == 1
    again = features(encoder, DATA, store=tmp_path)
    torch.testing.assert_close(again.batch(range(50))[0], wanted)
    assert again.report.computed == 0, "it was healed in the store"


@pytest.mark.parametrize("what", ["module", "dataset"])
def test_a_row_is_not_healed_from_what_has_changed(encoder, tmp_path, what):
    data = X.clone()
    wanted = features(encoder, data, store=tmp_path)[11]
    assert damage(tmp_path, wanted)
    rows = features(encoder, data, store=tmp_path)
    with torch.no_grad():
        (encoder.weight if what == "module" else data).mul_(2)
    with pytest.raises(StoreError, match="no longer what"):
        rows.batch([11])
    with torch.no_grad():
        (encoder.weight if what == "module" else data).mul_(0.5)
    torch.testing.assert_close(rows.batch([11])[0], wanted)


def test_a_removed_segment_is_computed_again(encoder, tmp_path):
    wanted = features(encoder, DATA, store=tmp_path).batch(range(50))[0]
    for path in segments_of(tmp_path):
        path.unlink()
    rows = features(encoder, DATA, store=tmp_path)
    assert rows.report.computed == 50
    torch.testing.assert_close(rows.batch(range(50))[0], wanted)


def test_a_copy_in_another_process_reads_but_does_not_heal(encoder, tmp_path):
    rows = features(encoder, DATA, store=tmp_path)
    copied = pickle.loads(pickle.dumps(rows))  # noqa: S301 - our own bytes
    assert torch.equal(copied.batch([1, 2])[0], rows.batch([1, 2])[0])
    assert damage(tmp_path, rows.batch([30])[0][0])
    copied = pickle.loads(pickle.dumps(rows))  # noqa: S301
    with pytest.raises(StoreError, match="main process"):
        copied.batch([30])


def test_a_store_that_cannot_be_written_still_serves(encoder, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    rows = features(encoder, DATA, batch_size=16, store=tmp_path / "file" / "store")
    torch.testing.assert_close(rows.batch(range(50))[0], encoder(X).detach())
    assert "cannot be written" in caplog.text


def test_an_audit_passes_on_true_rows_and_catches_a_wrong_declaration(tmp_path):
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    features(Scale(2.0), X, store=tmp_path, version="1")
    rows = features(Scale(2.0), X, store=tmp_path, version="1", audit=0.2)
    assert rows.report.audited == 10
    assert rows.report.audit_worst == 0.0
    with pytest.raises(StateMismatchError, match="audit"):
        features(Scale(2.1), X, store=tmp_path, version="1", audit=0.2)


@pytest.mark.parametrize(
    ("dtype", "relative", "passes"),
    [
        (torch.float32, 1e-5, True),
        (torch.float32, 1e-3, False),
        (torch.bfloat16, 1e-2, True),
        (torch.bfloat16, 1e-1, False),
        (torch.float32, float("nan"), False),
    ],
)
def test_audits_tolerate_what_the_dtype_rounds(dtype, relative, passes):
    values = torch.ones(2, 3, dtype=dtype)
    column = Column("", str(dtype).removeprefix("torch."), (3,))
    fresh = Rows(np.zeros(2, "S16"), (column,), (values,))
    assert (compare(fresh, ((values * (1 + relative)).to(dtype),)) <= 1.0) is passes


def test_several_heads_train_on_one_pass(encoder, tmp_path):
    rows = features(encoder, DATA, store=tmp_path)
    heads = [nn.Linear(4, 1) for _ in range(3)]
    for batch, _ in DataLoader(rows, batch_size=25, collate_fn=rows.collate):
        sum(head(batch).sum() for head in heads).backward()
    assert all(head.weight.grad is not None for head in heads)
    assert encoder.weight.grad is None


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 1}, {"audit": 2.0}, {"verify": "never"}, {"variants": -1},
     {"store": "s3://bucket"}],
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_refused(encoder, tmp_path, arguments):
    with pytest.raises(ConfigError):
        features(encoder, X, **{"store": tmp_path, **arguments})


def test_the_store_is_found_by_the_environment(encoder, tmp_path, monkeypatch):
    monkeypatch.delenv("TRAINONCE_STORE", raising=False)
    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path / "home"))
    features(encoder, X)
    assert segments_of(tmp_path / "home" / "store" / "rows")
    monkeypatch.setenv("TRAINONCE_STORE", str(tmp_path / "store"))
    assert features(encoder, X).report.computed == 50
    assert segments_of(tmp_path / "store" / "rows")
