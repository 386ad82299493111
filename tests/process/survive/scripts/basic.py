"""DDP with BatchNorm, dropout, clipping, AdamW and a scheduler, in a loop of the user's own."""

import argparse
import time

import torch
from pieces import batch, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=20)
options.add_argument("--verify", type=int, default=0, help="compare replicas so often")
options.add_argument("--uneven-s", type=float, default=0.0, help="longer set-up, a rank")
options = options.parse_args()

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.BatchNorm1d(48), torch.nn.Dropout(0.1)), bucket_cap_mb=0.005)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
run.protect(
    verify_replicas_every=options.verify, model=model, optimizer=optimizer, scheduler=scheduler
)
time.sleep(options.uneven_s * run.rank)


@run.step
def train(step):
    x, y = batch(step, run.rank)
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.detach()


for step in range(options.steps):
    loss = train(step)

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer, scheduler=scheduler),
    steps=run.step_index,
)
