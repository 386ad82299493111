"""The digest of a subgraph: it changes with everything that changes results, and only then."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

from trainonce.errors import DataError
from trainonce.graph.features import fingerprint as fp
from trainonce.graph.features.graphs import trace


class Net(nn.Module):
    def __init__(self, slope=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(6)
        self.lin = nn.Linear(6, 4)
        self.unused = nn.Linear(2, 2)
        self.shift = torch.tensor(0.5)
        self.slope = slope

    def forward(self, x):
        return nn.functional.leaky_relu(self.lin(self.norm(x)) + self.shift, self.slope)


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.BatchNorm1d(6)
        self.b = nn.Linear(6, 4)
        self.register_buffer("c", torch.tensor(0.5))

    def forward(self, values):
        """Computes the same under other names."""
        hidden = self.b(self.a(values))
        hidden = hidden + self.c
        return nn.functional.leaky_relu(hidden, 0.1)


X = torch.randn(8, 6)


def name(module, x=X, **options):
    return fp.fingerprint(module, (x,), **options).digest


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def before(net):
    return name(net)


def test_the_same_module_has_the_same_digest_each_time(net, before):
    assert name(net) == before
    assert name(copy.deepcopy(net)) == before
    assert name(Net().eval()) == before


def test_harmless_changes_keep_the_digest(net, before):
    net.unused.weight.data.mul_(2)
    net.norm.num_batches_tracked += 5
    net.requires_grad_(False)
    net.lin.weight.grad = torch.ones_like(net.lin.weight)
    assert name(net) == before
    assert name(net, torch.randn(32, 6)) == before, "the batch size does not count"


def test_names_do_not_count(before):
    class Other(Net):
        def forward(self, x):
            return super().forward(x)

    assert name(Other().eval()) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.lin.weight.data.add_(1e-6),
        lambda net: net.lin.weight.data.numpy().__setitem__((0, 0), 3.0),
        lambda net: net.norm.running_mean.add_(0.1),
        lambda net: setattr(net, "shift", torch.tensor(0.25)),
        lambda net: setattr(net, "slope", 0.2),
        lambda net: setattr(net.norm, "eps", 1e-3),
        lambda net: net.double(),
        lambda net: net.register_forward_hook(lambda module, args, out: out * 2),
        lambda net: setattr(net, "lin", nn.Sequential(net.lin, nn.ReLU())),
    ],
    ids=["weight", "weight through numpy", "buffer", "constant", "setting", "setting of a layer",
         "dtype", "hook", "layer"],
)  # fmt: skip
def test_every_change_of_results_changes_the_digest(net, before, change):
    change(net)
    x = X.double() if net.lin is not None and next(net.parameters()).dtype == torch.float64 else X
    assert name(net, x) != before


def test_numerics_in_force_change_the_digest(net, before):
    with torch.autocast("cpu", torch.bfloat16):
        assert name(net) != before
    torch.use_deterministic_algorithms(True)
    try:
        assert name(net) != before
    finally:
        torch.use_deterministic_algorithms(False)
    assert name(net, storage_dtype=torch.float16) != before
    assert name(net) == before


def test_another_torch_changes_the_digest(net, before, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert name(net) != before


def test_exact_counts_threads_and_the_batch_size(net):
    first = name(net, exact=True)
    assert name(net, torch.randn(16, 6), exact=True) != first
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert name(net, exact=True) != first
    finally:
        torch.set_num_threads(threads)


def test_batch_statistics_and_dropout_are_refused_with_the_reason():
    with pytest.raises(DataError, match=r"changes its buffers.*running_mean"):
        name(Net().train())
    with pytest.raises(DataError, match="draws random numbers"):
        name(nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)).train())


def test_a_module_that_cannot_be_traced_needs_a_declared_version():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 2)

        def forward(self, x):
            return self.lin(x) if float(x.sum()) > 0 else -self.lin(x)

    net = Branching()
    with pytest.raises(DataError, match="version="):
        name(net)
    declared = name(net, version="1")
    assert name(net, version="2") != declared
    net.lin.weight.data.add_(1)
    assert name(net, version="1") != declared


def test_torch_fx_serves_where_export_fails(monkeypatch):
    from trainonce.graph.features import graphs

    def broken(*args, **kwargs):
        raise RuntimeError("not today")

    monkeypatch.setattr(graphs, "export", broken)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    facts, _ = trace(net, (X,), {})
    assert facts is not None
    assert facts.how == "fx"
    assert "1.running_mean" in facts.state
    assert facts.unproven, "nothing is proven about rows"
    again, _ = trace(nn.Sequential(*net[:2], nn.Tanh()).eval(), (X,), {})
    assert again is not None
    assert again.digest != facts.digest
    training, _ = trace(net.train(), (X,), {})
    assert training is not None
    assert "changes its buffers" in training.refusal


def test_an_edit_of_the_code_changes_the_digest_and_a_comment_does_not(tmp_path):
    source = """
import torch
from torch import nn
{comment}
def helper(x):
    return x * {factor}

class Net(nn.Module):
    def forward(self, x):
        return helper(x)
"""

    def load(number, **parts):
        path = tmp_path / f"net{number}.py"
        path.write_text(source.format(**parts))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return name(module.Net())

    first = load(1, comment="", factor=2)
    assert load(2, comment="# the same", factor=2) == first
    assert load(3, comment="", factor=3) != first


def test_the_trace_is_kept_for_other_processes_and_a_damaged_one_is_ignored(
    net, before, tmp_path, monkeypatch
):
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return trace(*args, **kwargs)

    monkeypatch.setattr(fp, "trace", counting)
    for expected in (1, 1):
        monkeypatch.setattr(fp, "_facts", {})
        assert name(net, memo=tmp_path) == before
        assert len(calls) == expected
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(path.read_bytes().replace(b"export", b"expert", 1))
    monkeypatch.setattr(fp, "_facts", {})
    assert name(net, memo=tmp_path) == before
    assert len(calls) == 2


def test_versions_see_optimizer_steps_and_loading(net):
    versions = fp.Versions(net.parameters)
    assert not versions.changed()
    with torch.no_grad():
        net.lin.weight.add_(1)
    assert versions.changed()
    assert not versions.changed()
    net.load_state_dict(net.state_dict())
    assert versions.changed()
    net.lin.weight = nn.Parameter(net.lin.weight.detach().clone())
    assert versions.changed()
    assert not versions.changed()


def test_explain_names_the_part_that_differs(net):
    first = fp.fingerprint(net, (X,))
    net.lin.weight.data.add_(1)
    (line,) = fp.fingerprint(net, (X,)).explain(dict(first.parts))
    assert line.startswith("weights:")


def test_sharded_or_meta_weights_are_refused():
    with pytest.raises(DataError, match="meta"):
        fp.weights_digest(nn.Linear(2, 2, device="meta"), ["weight"])
