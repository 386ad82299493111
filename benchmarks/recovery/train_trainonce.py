"""Trains until it is stopped, under `trainonce run`: one record a committed step."""

import os

import torch
from harness import open_records, write_record
from torch.nn.parallel import DistributedDataParallel
from workload import build, trained

import trainonce

torch.set_num_threads(1)
run = trainonce.init()
net, size = build(os.environ["MODEL"])
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(trained(net), lr=1e-3)
loader = run.dataloader(net.samples(4096), batch_size=size)
run.protect(model=model, optimizer=optimizer, loader=loader)
records = open_records()


@run.step
def train_step(x, y):
    loss = net.loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


for x, y in run.batches(loader, max_steps=1_000_000):
    committed = run.step_index
    train_step(x, y)
    if run.step_index > committed:  # else it was committed before this process took over
        write_record(records, run.rank, run.step_index)
