"""Plain DDP under torchrun: `twin_once.py` is the same script with TrainOnce in it."""

import torch
import torch.distributed as dist
from pieces import loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

from trainonce.testing import record, state_digests

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.BatchNorm1d(48)), bucket_cap_mb=0.005)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(step):
    loss = loss_of(model, step, dist.get_rank())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


for step in range(25):
    train(step)
record(dist.get_rank(), state=state_digests(model=model, optimizer=optimizer))
dist.destroy_process_group()
