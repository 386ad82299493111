"""A schedule of learning rates that is stepped between steps, and seldom."""

import torch
from pieces import loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
run.protect(model=model, optimizer=optimizer, scheduler=scheduler)


@run.step
def train(step):
    loss_of(model, step, run.rank).backward()
    optimizer.step()
    optimizer.zero_grad()


for step in range(6):
    train(step)
    if step == 3:
        scheduler.step()
record(run.rank, state=state_digests(model=model, optimizer=optimizer, scheduler=scheduler))
