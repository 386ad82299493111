"""The proof that rows are independent: it holds where they are, and never where they are not."""

import pytest
import torch
from torch import nn

from trainonce.graph.features import graphs, rowwise

torch.manual_seed(0)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embedding = nn.Embedding(20, 8)

    def forward(self, tokens):
        return self.layer(self.embedding(tokens)).mean(1)


class Recurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


INDEPENDENT = {
    "linear over tokens": (nn.Linear(6, 3), torch.randn(4, 5, 6)),
    "convolution, norm, pool": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(),
        torch.randn(4, 2, 8, 8),
    ),
    "attention": (Attention().eval(), torch.randint(0, 20, (4, 5))),
    "recurrence": (Recurrence(), torch.randn(4, 3, 4)),
    "group norm": (nn.GroupNorm(2, 4), torch.randn(4, 4, 3)),
    "reshapes": (Call(lambda x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1)),
                 torch.randn(4, 6)),
    "transposed and back": (Call(lambda x: x.t().add(1).t()), torch.randn(4, 6)),
    "pad, slice, concatenate": (
        Call(lambda x: torch.cat([nn.functional.pad(x, (1, 1))[:, :4], x], 1)),
        torch.randn(4, 6),
    ),
    "statistics over features": (
        Call(lambda x: (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True)),
        torch.randn(4, 6),
    ),
}  # fmt: skip

DEPENDENT = {
    "batch mean": (Call(lambda x: x - x.mean(0)), torch.randn(4, 6)),
    "softmax over the batch": (Call(lambda x: x.softmax(0)), torch.randn(4, 6)),
    "similarity between rows": (Call(lambda x: x @ x.t()), torch.randn(4, 6)),
    "batch size": (Call(lambda x: x / x.shape[0]), torch.randn(4, 6)),
    "position in the batch": (
        Call(lambda x: x + torch.arange(x.shape[0])[:, None]), torch.randn(4, 6)),
    "flip": (Call(lambda x: x.flip(0)), torch.randn(4, 6)),
    "first row": (Call(lambda x: x + x[:1]), torch.randn(4, 6)),
    "rows merged with features": (
        Call(lambda x: x.t().reshape(-1, 6)), torch.randn(4, 6)),
    "unbatched output": (Call(lambda x: x.sum(0)), torch.randn(4, 6)),
    "transposed attention": (
        Call(lambda x: x.transpose(0, 1).softmax(1).transpose(0, 1)), torch.randn(4, 5, 3)),
}  # fmt: skip


def proof(module, example):
    return rowwise.unproven(graphs.decompose(graphs.export(module, (example,), {})))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_rows_are_proven_and_their_values_agree(name):
    module, example = INDEPENDENT[name]
    assert proof(module, example) == ""
    with torch.no_grad():
        together, apart = module(example), module(example[2:].flip(0))
    torch.testing.assert_close(together[2:].flip(0), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DEPENDENT)
def test_rows_that_depend_on_their_batch_are_never_proven(name):
    assert proof(*DEPENDENT[name]) != ""
