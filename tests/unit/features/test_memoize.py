"""`memoize`: the same training, with the frozen part computed once."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainonce.errors import DataError
from trainonce.events import ComputeSaved
from trainonce.graph.features.marks import RowTensor, mark, names_of, unmarked
from trainonce.graph.features.memoize import memoize
from trainonce.graph.features.samples import array_digests

X = torch.randn(120, 1, 6, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(120) % 3
DATA = TensorDataset(X, Y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)
        )
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.stem(x).flatten(1))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net.stem.requires_grad_(False)
    return net


def train(net, model, loader, epochs=3):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(epochs):
        net.train()
        net.stem.eval()
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


def loader_of(data=DATA, **options):
    return DataLoader(data, batch_size=32, shuffle=True, **options)


def test_training_is_the_same_and_the_prefix_is_computed_once(net, tmp_path):
    plain = copy.deepcopy(net)
    train(plain, plain, loader_of())
    events = []
    model, loader = memoize(net, loader_of(), store=tmp_path, sink=events.append)
    train(net, model, loader)
    assert (model.report.computed, model.report.hits, model.report.cuts) == (120, 240, 1)
    assert "operators are served" in model.explain()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert all(isinstance(event, ComputeSaved) for event in events)
    assert len(events) == 2, "the first epoch was served nothing"


def test_another_run_and_another_head_find_the_rows(net, tmp_path):
    train(net, *memoize(net, loader_of(), store=tmp_path), epochs=1)
    torch.manual_seed(7)
    other = Net()
    other.stem.load_state_dict(net.stem.state_dict())
    other.stem.requires_grad_(False)
    model, loader = memoize(other, loader_of(), store=tmp_path)
    train(other, model, loader, epochs=1)
    assert model.report.computed == 0


def test_models_that_share_a_frozen_part_evaluate_it_once_a_batch(net, tmp_path):
    torch.manual_seed(7)
    other = Net()
    other.stem.load_state_dict(net.stem.state_dict())
    other.stem.requires_grad_(False)
    nets = [net.eval(), other.eval()]
    first, loader = memoize(nets[0], loader_of(), store=tmp_path)
    second, _ = memoize(nets[1], loader_of(), store=tmp_path)
    for x, _ in loader:
        for model, plain in zip((first, second), nets, strict=True):
            torch.testing.assert_close(model(x), plain(x.as_subclass(torch.Tensor)))
    assert (first.report.computed, second.report.computed) == (120, 0)
    assert second.report.hits == 120
    with torch.no_grad():
        other.stem[0].weight.data += 1  # no longer the same part
    for x, _ in memoize(nets[1], loader_of(), store=tmp_path)[1]:
        torch.testing.assert_close(first(x), nets[0](x.as_subclass(torch.Tensor)))
    second.start_epoch()
    torch.testing.assert_close(second(X[:32]), nets[1](X[:32]))
    assert second.report.computed == 32


def test_unfreezing_moves_the_cut_and_freezing_moves_it_back(net, tmp_path):
    model, loader = memoize(net, loader_of(), store=tmp_path)
    train(net, model, loader, epochs=1)
    whole = model.explain()
    net.stem[3].requires_grad_(True)
    train(net, model, loader, epochs=1)
    assert model.explain() != whole
    assert net.stem[3].weight.grad is None, "the optimizer cleared it: it was trained"
    with torch.no_grad():
        torch.testing.assert_close(model(X[:8]), net(X[:8])) if not net.training else None
    net.stem[3].requires_grad_(False)
    train(net, model, loader, epochs=1)
    assert model.explain() == whole
    net.eval()
    torch.testing.assert_close(model(X[:8]), net(X[:8]))


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "through .data"])
def test_changed_frozen_weights_are_noticed(net, tmp_path, through_data):
    model, loader = memoize(net, loader_of(), store=tmp_path)
    train(net, model, loader, epochs=1)
    if through_data:
        net.stem[0].weight.data.mul_(1.5)
    else:
        with torch.no_grad():
            net.stem[0].weight.mul_(1.5)
    net.eval()
    for x, _ in loader:
        torch.testing.assert_close(model(x), net(x.as_subclass(torch.Tensor)))


def test_rows_computed_after_an_unseen_change_are_not_committed(net, tmp_path):
    net.eval()
    model, loader = memoize(net, loader_of(), store=tmp_path)
    for number, (x, _) in enumerate(loader):
        model(x)
        if number == 1:
            net.stem[0].weight.data.mul_(1.5)
    assert not list(tmp_path.rglob("*.rows")), "nothing says which of them are right"
    for x, _ in loader:
        torch.testing.assert_close(model(x), net(x.as_subclass(torch.Tensor)))
    assert list(tmp_path.rglob("*.rows"))


def test_a_loop_that_stops_early_keeps_what_it_computed(net, tmp_path):
    model, loader = memoize(net.eval(), loader_of(), store=tmp_path)
    for x, _ in loader:
        model(x)
        break
    assert list(tmp_path.rglob("*.rows"))


def test_inputs_of_ever_new_shapes_are_not_cut_for_ever(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    net[0].requires_grad_(False)
    model, _ = memoize(net, loader_of(), store=tmp_path)
    for length in range(1, 12):
        x = torch.randn(4, length, 4)
        torch.testing.assert_close(model(x), net(x))
    assert model.report.cuts == 8
    assert "differ in shape" in model.explain()


def test_a_frozen_layer_that_updates_statistics_ends_the_prefix(net, tmp_path):
    model, loader = memoize(net, loader_of(), store=tmp_path)
    net.train()
    before = net.stem[1].running_mean.clone()
    for x, _ in loader:
        model(x)
    assert "stem.0" in model.explain()
    assert not torch.equal(net.stem[1].running_mean, before), "the rest runs as ever"


def test_a_model_without_a_frozen_part_runs_as_it_is(net, tmp_path):
    net.requires_grad_(True)
    model, loader = memoize(net, loader_of(), store=tmp_path)
    net.eval()
    for x, _ in loader:
        torch.testing.assert_close(model(x), net(x.as_subclass(torch.Tensor)))
    assert "not cut" in model.explain()
    assert model.report.hits == 0


def test_hooks_prevent_a_cut(net, tmp_path):
    net.head.register_forward_hook(lambda *_: None)
    model, _ = memoize(net, loader_of(), store=tmp_path)
    model(X[:8])
    assert "hooks" in model.explain()


def test_rows_that_mix_samples_are_not_stored(tmp_path):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.first(x)
            return self.last(hidden - hidden.mean(0))

    net = Mixing()
    net.first.requires_grad_(False)
    model, _ = memoize(net, loader_of(), store=tmp_path)
    x = X[:8, 0, 0]
    torch.testing.assert_close(model(x), net(x))
    assert "not proven independent" in model.explain()


def test_the_same_rows_are_found_without_the_loader_by_content(net, tmp_path):
    model, loader = memoize(net, loader_of(), store=tmp_path)
    train(net, model, loader, epochs=1)
    net.eval()
    net.stem.eval()
    model(X[:16])
    assert model.report.hits == 16


def test_unmarked_tensors_on_a_device_are_refused(net, tmp_path):
    model, _ = memoize(net.eval(), loader_of(), store=tmp_path)
    model(X[:8])
    with pytest.raises(DataError, match="not marked with its rows"):
        names_of([X[:8].to("meta")])


def test_marks_survive_moves_and_copies_and_nothing_else():
    rows = array_digests([("0", X)])
    marked = mark(X, rows)
    for kept in (marked.to("cpu"), marked.clone(), marked.detach(), marked.contiguous()):
        assert isinstance(kept, RowTensor)
        assert (kept.rows == rows).all()
    for lost in (marked[:5], marked * 2, marked.flip(0), marked.double(), marked + marked):
        assert not isinstance(lost, RowTensor)


CHANGES = {
    "in place": lambda x: x.mul_(2),
    "one row": lambda x: x.__setitem__(0, 0.0),
    "a view": lambda x: x[2:4].zero_(),
    "a detached alias": lambda x: x.detach().add_(1),
    "through numpy": lambda x: np.add(x.numpy(), 1, out=x.numpy()),
    "through np.asarray": lambda x: np.negative(np.asarray(x), out=np.asarray(x)),
    "through .data": lambda x: x.data.add_(1),
    "out=": lambda x: torch.add(x, 1, out=x),
}


@pytest.mark.parametrize("inference", [False, True])
def test_a_batch_that_a_loop_changes_is_not_served_old_rows(net, tmp_path, inference):
    model, loader = memoize(net.eval(), loader_of(), store=tmp_path)
    with torch.inference_mode(inference), torch.no_grad():
        for change in CHANGES.values():
            for x, _ in loader:
                assert torch.allclose(model(x), net(x), atol=1e-5)
                before, alias = x.clone(), x.detach()
                change(x)
                assert not torch.equal(x, before)
                assert torch.allclose(model(before), net(unmarked(before)), atol=1e-5)
                for same in (x, x.to("cpu"), x.detach(), alias):
                    assert torch.allclose(model(same), net(unmarked(x)), atol=1e-5)
    with pytest.raises(DataError, match="changed since"):
        names_of([mark(torch.ones(3, 2), np.zeros(3, "S16")).mul_(2).to("meta")])


def test_worker_processes_and_dicts_of_inputs(net, tmp_path):
    class Records(Dataset):
        def __len__(self):
            return 40

        def sample_key(self, index):
            return index

        def __getitem__(self, index):
            return {"image": X[index], "label": index}

    model, loader = memoize(
        net.eval(),
        loader_of(Records(), num_workers=1, multiprocessing_context="fork"),
        inputs="image",
        store=tmp_path,
    )
    for _ in range(2):
        for batch in loader:
            assert isinstance(batch["image"], RowTensor)
            assert not isinstance(batch["label"], RowTensor)
            wanted = net(X[batch["label"]])
            torch.testing.assert_close(model(batch["image"]), wanted)
    assert (model.report.computed, model.report.hits) == (40, 40)
    assert len(loader) == 2
    assert loader.batch_sampler is not None


def test_random_samples_are_refused(net, tmp_path):
    class Random(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return torch.randn(1, 6, 6)

    with pytest.raises(DataError, match="random numbers"):
        memoize(net, loader_of(Random()), store=tmp_path)


def test_a_loader_that_does_not_say_what_it_yields_is_refused(net, tmp_path):
    with pytest.raises(DataError, match="which samples"):
        memoize(net, [X], store=tmp_path)


def test_rows_may_be_stored_in_another_dtype(net, tmp_path):
    model, loader = memoize(net, loader_of(), store=tmp_path, storage_dtype=torch.float16)
    train(net, model, loader, epochs=2)
    assert model.report.hits == 120
    net.eval()
    torch.testing.assert_close(model(X[:8]), net(X[:8]), rtol=1e-2, atol=1e-2)
