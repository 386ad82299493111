"""Small models and data that depend on (step, rank) alone; the pieces of the scripts here."""

import faulthandler

import torch

torch.set_num_threads(1)
# Says where a job is stuck, well before its test gives up.
faulthandler.dump_traceback_later(100)

WIDTH = 24


def mlp(outputs=1, *extra):
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 48), *extra, torch.nn.GELU(),
        torch.nn.Linear(48, 48), torch.nn.GELU(), torch.nn.Linear(48, outputs),
    )  # fmt: skip


def batch(step, rank, samples=8):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(samples, WIDTH, generator=generator)
    return x, x.sum(dim=1, keepdim=True).sin()


def loss_of(model, step, rank):
    x, y = batch(step, rank)
    return ((model(x) - y) ** 2).mean()
