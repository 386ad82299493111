"""A script that uses the package wrongly, or does not heed an exception of its own."""

import argparse
from pathlib import Path

import torch
from pieces import batch, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

options = argparse.ArgumentParser()
options.add_argument("how", choices=["mean outside", "changed outside", "caught"])
options.add_argument("--once", type=Path, help="the first process to make this file fails")
chosen = options.parse_args()

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.protect(model=model, optimizer=optimizer)


def is_first():
    try:
        chosen.once.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@run.step
def train(step):
    x, y = batch(step, run.rank)
    loss = ((model(x) - y) ** 2).mean()
    if chosen.how == "caught" and step == 3 and run.rank == 1 and is_first():
        raise ValueError("flaky")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


for step in range(6):
    try:
        train(step)
    except ValueError:
        train(step)  # not heeded: the step was not finished
    if step == 3 and run.rank == 1 and chosen.how == "mean outside":
        run.mean(1.0)
    if step == 3 and chosen.how == "changed outside":
        torch.nn.init.zeros_(next(model.parameters()))
record(run.rank, state=state_digests(model=model, optimizer=optimizer))
