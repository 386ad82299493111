"""Like basic.py; half-way it makes empty steps until every rank has a device of its own."""

import argparse
import os
import time

import torch
import torch.distributed as dist
from pieces import loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=16)
options.add_argument("--until-apart", type=int, default=-1, help="before this step")
options.add_argument("--until", default=".", help="and until there is this file")
options = options.parse_args()

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.BatchNorm1d(48)), bucket_cap_mb=0.005)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run.protect(model=model, optimizer=optimizer)


@run.step
def train(step):
    loss = loss_of(model, step, run.rank)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@run.step
def are_apart():
    """Tell whether no two ranks share a slot, and all see the file; leaves all state as it is."""
    ranks_in = torch.zeros(16, dtype=torch.int64)
    ranks_in[int(os.environ["TRAINONCE_SLOT"])] = 1
    ranks_in[-1] = 0 if os.path.exists(options.until) else 2
    dist.all_reduce(ranks_in)
    return int(ranks_in.max()) == 1


for step in range(options.steps):
    if step == options.until_apart:
        while not are_apart():
            time.sleep(0.01)  # a worker that starts needs the processor, too
    train(step)

record(run.rank, state=state_digests(model=model, optimizer=optimizer))
