"""Trains with a transform that takes long, on ranks of which one may be slower than the others."""

import os
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce

steps, sample_s, slow_worker = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
run = trainonce.init()
torch.manual_seed(0)
model = DDP(torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)))
optimizer = torch.optim.AdamW(model.parameters())


def blur(x):
    until_s = time.perf_counter() + sample_s
    while time.perf_counter() < until_s:
        pass
    return x


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4096

    def __getitem__(self, index):
        x = torch.full((8,), index / 4096)
        return blur(x), x.sum(0, keepdim=True)


loader = run.dataloader(Data(), batch_size=2)
run.protect(model=model, optimizer=optimizer, loader=loader)


@run.step
def train_step(x, y):
    time.sleep(0.005 if os.environ["TRAINONCE_WORKER"] != slow_worker else 0.060)
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


for x, y in run.batches(loader, max_steps=steps):
    train_step(x, y)
