"""Epochs over a loader with workers, an evaluation in a step of its own, and `run.state`."""

import argparse

import torch
import torch.distributed as dist
from pieces import WIDTH, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

options = argparse.ArgumentParser()
options.add_argument("--workers", type=int, default=0)
options.add_argument("--epochs", type=int, default=3)
options = options.parse_args()

SAMPLES = 45


class Augmented(torch.utils.data.Dataset):
    """Each sample is its number and noise that is drawn anew every time."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = torch.full((WIDTH,), index / SAMPLES) + 0.01 * torch.randn(WIDTH)
        return {"x": x, "y": x[:1].sin(), "id": index}


run = trainonce.init(seed=11)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.Dropout(0.1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
loader = run.dataloader(Augmented(), batch_size=4, shuffle=True, num_workers=options.workers)
run.protect(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)


@run.step
def train(batch):
    ids = batch["id"].tolist()
    run.state.setdefault("seen", {}).setdefault(str(epoch), []).extend(ids)
    record(run.rank, epoch=epoch, step=run.step_index, ids=ids)
    loss = ((model(batch["x"]) - batch["y"]) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return run.mean(loss)


@run.step
def evaluate():
    model.eval()
    with torch.no_grad():
        score = model.module(torch.ones(4, WIDTH) * run.rank).mean()
    dist.all_reduce(score)
    model.train()
    return score.item()


for epoch in run.epochs(options.epochs):  # noqa: B007 - `train` reads it
    for batch in run.batches(loader):
        mean = train(batch)
    score = evaluate()
    if score is not trainonce.LOST:
        run.state["best"] = min(score, run.state.get("best", score))
    scheduler.step()

record(
    run.rank,
    state={**state_digests(model=model, optimizer=optimizer, scheduler=scheduler), **run.state},
    steps=run.step_index,
)
