"""Models and batches of the benchmarks: the same numbers on every machine and rank count."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Mlp(nn.Module):
    """`layers` square layers of width `dim`, and a table of `frozen_bytes` that is not trained.

    The table stands for the frozen base under an adapter: state that has to move when a rank
    is rebuilt, and costs nothing in a step.
    """

    def __init__(self, dim: int, layers: int, frozen_bytes: int = 0) -> None:
        super().__init__()
        body = [module for _ in range(layers) for module in (nn.Linear(dim, dim), nn.GELU())]
        self.body = nn.Sequential(*body, nn.Linear(dim, 1))
        self.dim = dim
        self.frozen = nn.ParameterList(
            nn.Parameter(torch.full((size // 4,), 0.5), requires_grad=False)
            for size in _pieces(frozen_bytes, 64 << 20)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[batch, dim]` to `[batch, 1]`."""
        return self.body(x)

    def samples(self, count: int) -> TensorDataset:
        x = torch.randn(count, self.dim, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, (2 * x[:, :1]).sin())

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(output, target)


class Gpt(nn.Module):
    """A small causal transformer over `vocabulary` tokens, `length` positions."""

    def __init__(self, dim: int, layers: int, length: int = 64, vocabulary: int = 256) -> None:
        super().__init__()
        self.length, self.vocabulary = length, vocabulary
        self.tokens = nn.Embedding(vocabulary, dim)
        self.places = nn.Embedding(length, dim)
        layer = nn.TransformerEncoderLayer(
            dim, dim // 32, 4 * dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens `[batch, length]` to logits `[batch, length, vocabulary]`."""
        hidden = self.tokens(x) + self.places.weight
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True))

    def samples(self, count: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        start = torch.randint(0, self.vocabulary, (count, 1), generator=generator)
        place = torch.arange(self.length + 1)
        tokens = (3 * start + 5 * place * place + place) % self.vocabulary
        return TensorDataset(tokens[:, :-1], tokens[:, 1:])

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def build(spec: str) -> tuple[Mlp | Gpt, int]:
    """Return the model and batch size of `kind:dim:layers:batch[:frozen_mb]`."""
    kind, dim, layers, batch, *rest = spec.split(":")
    torch.manual_seed(0)
    if kind == "gpt":
        return Gpt(int(dim), int(layers)), int(batch)
    frozen_bytes = int(rest[0]) * 1_000_000 if rest else 0
    return Mlp(int(dim), int(layers), frozen_bytes), int(batch)


def batches(dataset: TensorDataset, size: int, rank: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches of consecutive samples for ever; ranks 0 to 3 begin at other places."""
    for step in itertools.count():
        begin = (4 * step + rank) * size % (len(dataset) - size)
        yield dataset[begin : begin + size]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of the bytes of `tensors`, shortened."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]


def _pieces(total: int, size: int) -> list[int]:
    return [min(size, total - begin) for begin in range(0, total, size)]
