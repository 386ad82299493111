"""Ranks of one job that share a store: a node, features of it, and a head that is trained."""

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import TensorDataset

import trainonce as once
from trainonce.testing import record, state_digests

NUM = 512


@once.node
def prepare(num):
    with open(os.path.join(LOG, "prepared"), "a") as file:
        file.write("x")
    return torch.arange(num * 8.0).view(num, 8) / (8 * num)


LOG = os.environ["LOG"]
x = once.compute(prepare(NUM))  # before `init`: who has joined a group waits for nobody
run = once.init()
torch.manual_seed(0)
backbone = nn.Sequential(nn.Linear(8, 32), nn.Tanh()).eval().requires_grad_(False)
rows = once.features(backbone, TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=64)
with open(os.path.join(LOG, "rows"), "a") as file:
    file.write(f"{rows.report.computed}\n")
model = DDP(nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = run.dataloader(rows, batch_size=16, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader)


@run.step
def train_step(features, target):
    loss = nn.functional.mse_loss(model(features), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


for features, target in run.batches(loader, max_steps=24):
    train_step(features, target)
record(run.rank, state=state_digests(model=model, optimizer=optimizer))
