"""Steps that write to a large variable now and then, before or after their last collective."""

import argparse

import torch
from pieces import loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

options = argparse.ArgumentParser()
options.add_argument("--moment", choices=["ahead", "late"])
options = options.parse_args()

run = trainonce.init(seed=4)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.BatchNorm1d(48)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.protect(model=model, optimizer=optimizer)


class Keeper:
    weights = torch.zeros(1)


keeper = Keeper()
keeper.weights = torch.zeros(sum(each.numel() for each in model.parameters()))


def keep(step):
    if step % 5 == 0:
        torch.cat([each.detach().flatten() for each in model.parameters()], out=keeper.weights)


@run.step
def train(step):
    if options.moment == "ahead":
        keep(step)
    loss_of(model, step, run.rank).backward()
    optimizer.step()
    optimizer.zero_grad()
    if options.moment == "late":
        keep(step)


for step in range(14):
    train(step)

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    kept=keeper.weights.double().sum().item().hex(),
    steps=run.step_index,
)
