"""A step whose first execution on rank 1 at step 5 takes all the memory there is."""

import os

import torch
from pieces import batch, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run.protect(model=model, optimizer=optimizer)


def fill_memory():
    """Once a job: the file says that it was done."""
    path = os.environ.get("FILLED")
    if path and not os.path.exists(path):
        open(path, "x").close()
        taken = []
        while True:
            taken.append(bytearray(b"\1" * (64 << 20)))


@run.step
def train(step):
    x, y = batch(step, run.rank)
    loss = ((model(x) - y) ** 2).mean()
    if step == 5 and run.rank == 1:
        fill_memory()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


for step in range(12):
    train(step)

record(run.rank, state=state_digests(model=model, optimizer=optimizer), steps=run.step_index)
