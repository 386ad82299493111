"""Trains; worker 1 hangs in a library that keeps the interpreter's lock."""

import ctypes
import os

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing.records import record, state_digests

run = trainonce.init()
torch.manual_seed(0)
model = DDP(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
loader = run.dataloader(data, batch_size=2)
run.protect(model=model, optimizer=optimizer, loader=loader)


def stuck_in_a_library():
    mutex = ctypes.create_string_buffer(64)  # of zeros: a plain one that is free
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


@run.step
def train_step(x, y):
    loss = torch.nn.functional.mse_loss(model(x), y)
    if os.environ["TRAINONCE_WORKER"] == "1" and run.step_index == 5:
        stuck_in_a_library()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


for x, y in run.batches(loader, max_steps=10):
    train_step(x, y)
record(run.rank, state=state_digests(model=model, optimizer=optimizer))
