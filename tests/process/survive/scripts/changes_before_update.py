"""Counts between the backward pass and the update: in a variable, in `run.state` and in a hook."""

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import TensorDataset

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init()
torch.manual_seed(0)
model = DDP(torch.nn.Linear(2, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
hooks, variables = {"calls": 0}, {"calls": 0}


def count(*_):
    hooks["calls"] += 1


optimizer.register_step_pre_hook(count)  # called before that of run.protect
loader = run.dataloader(TensorDataset(torch.randn(64, 2)), batch_size=4)
run.protect(model=model, optimizer=optimizer, loader=loader)
run.state["calls"] = 0


@run.step
def step(x):
    model(x).square().mean().backward()
    variables["calls"] += 1
    run.state["calls"] += 1
    optimizer.step()
    optimizer.zero_grad()


for (x,) in run.batches(loader, max_steps=10):
    step(x)
counts = [each["calls"] for each in (hooks, variables, run.state)]
record(run.rank, state=state_digests(model=model, optimizer=optimizer), counts=counts)
