"""Many short steps over a shuffled loader, with frequent checkpoints and compared replicas."""

import argparse
import os
from pathlib import Path

import torch
from pieces import WIDTH, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=300)
options.add_argument("--every", type=float, default=0.2)
options.add_argument("--verify", type=int, default=0)
options.add_argument("--until-saved", type=Path, help="the job's home: wait at step 200")
options = options.parse_args()

run = trainonce.init(seed=2, checkpoint_every_s=options.every)
torch.manual_seed(0)
x = torch.randn(60, WIDTH)
data = torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True).sin(), torch.arange(60))
model = DDP(mlp(1, torch.nn.BatchNorm1d(48), torch.nn.Dropout(0.1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = run.dataloader(data, batch_size=4, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader, verify_replicas_every=options.verify)


@run.step
def train(x, y, ids):
    run.state["seen"] = run.state.get("seen", 0) + len(ids)
    record(run.rank, step=run.step_index, ids=ids.tolist())
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def saved():
    folders = options.until_saved.glob("jobs/*/checkpoints/step-?????????")
    return any(int(folder.name[-9:]) for folder in folders)


for x, y, ids in run.batches(loader, max_steps=options.steps):
    while options.until_saved and run.step_index == 200 and not saved():
        os.sched_yield()  # one was ordered long ago, if they are due at once
    train(x, y, ids)

record(
    run.rank,
    state={**state_digests(model=model, optimizer=optimizer), **run.state},
    steps=run.step_index,
)
