"""Trains STEPS steps under `trainonce run`; one record a committed step, the digest at the end."""

import os

import torch
from harness import open_records, write_record
from torch.nn.parallel import DistributedDataParallel
from workload import build, digest, trained

import trainonce

torch.set_num_threads(1)
run = trainonce.init()
net, size = build(os.environ["MODEL"])
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(trained(net), lr=1e-3)
loader = run.dataloader(net.samples(4096), batch_size=size, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader)
records = open_records()


@run.step
def train_step(x, y):
    loss = net.loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


for x, y in run.batches(loader, max_steps=int(os.environ["STEPS"])):
    committed = run.step_index
    train_step(x, y)
    if run.step_index > committed:
        write_record(records, run.rank, run.step_index)
os.write(1, (digest(net.state_dict().values()) + "\n").encode())
