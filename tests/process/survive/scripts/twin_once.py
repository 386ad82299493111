"""`twin_plain.py` with the lines that TrainOnce takes."""

import torch
from pieces import loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init()
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.BatchNorm1d(48)), bucket_cap_mb=0.005)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run.protect(model=model, optimizer=optimizer)


@run.step
def train(step):
    loss = loss_of(model, step, run.rank)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


for step in range(25):
    train(step)
record(run.rank, state=state_digests(model=model, optimizer=optimizer))
