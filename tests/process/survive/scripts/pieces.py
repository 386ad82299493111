"""Small models and data that depend on (step, rank) alone; the pieces of the scripts here."""

import faulthandler

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

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


def sines():
    """Return 48 samples, drawn from torch's generator."""
    x = torch.randn(48, WIDTH)
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())


def small_job(run, batch_size):
    """Return a layer, its optimizer and a loader of 64 samples, all of them protected."""
    torch.manual_seed(0)
    model = DDP(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(64, 2))
    loader = run.dataloader(data, batch_size=batch_size)
    run.protect(model=model, optimizer=optimizer, loader=loader)
    return model, optimizer, loader


def descend(model, optimizer, x):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
