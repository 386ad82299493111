"""Small models and counters that the tests of features share."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn


class Counting(nn.Module):
    """A frozen encoder that counts the rows it is really called with."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight)


@pytest.fixture
def encoder() -> nn.Module:
    return Counting().eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
