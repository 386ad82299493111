"""Data parallel training whose ranks also send each other tensors and objects, in all ways."""

import argparse
import faulthandler

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import trainonce
from trainonce.testing import record, state_digests

WIDTH = 8

torch.set_num_threads(1)
faulthandler.dump_traceback_later(150)
parser = argparse.ArgumentParser()
parser.add_argument("way", choices=("all", "late", "unreceived", "sometimes", "anywhere"))
parser.add_argument("--steps", type=int, default=12)
arguments = parser.parse_args()
way = arguments.way

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(WIDTH, WIDTH))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run.protect(model=model, optimizer=optimizer)
size = run.world_size


def ring(x):
    """Return what the rank before this one has, by a batch of two."""
    came = torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, (run.rank + 1) % size),
            dist.P2POp(dist.irecv, came, (run.rank - 1) % size),
        ]
    )
    for work in works:
        work.wait()
    return came


def pairs(x):
    """Ranks 0 and 1 exchange views, something empty, and objects; both send first."""
    if run.rank > 1:
        return x
    other = 1 - run.rank
    long = torch.zeros(8, WIDTH)
    works = [dist.isend(x[1:3], other, tag=7), dist.isend(x.bfloat16(), other, tag=3)]
    half = torch.empty(x.shape, dtype=torch.bfloat16)
    dist.recv(half, other, tag=3)
    works.append(dist.irecv(long[3:5], other, tag=7))
    works.append(dist.isend(torch.empty(0), other))
    works.append(dist.irecv(torch.empty(0), other))
    for work in works:
        work.wait()
    objects = [{"rank": run.rank}, "x" * (run.step_index + 1)]
    if run.rank == 0:
        dist.send_object_list(objects, other)
    came = [None, None]
    dist.recv_object_list(came, other)
    assert came == [{"rank": other}, "x" * (run.step_index + 1)]
    if run.rank == 1:
        dist.send_object_list(objects, other)
    return x + long[1:5] + half.float()


@run.step
def train(step):
    generator = torch.Generator().manual_seed(1000 * step + run.rank)
    x = torch.randn(4, WIDTH, generator=generator)
    if way != "sometimes" or step % 5 == 4:
        x = ring(x)
    if way == "all":
        x = pairs(x)
    if way == "anywhere" and run.rank == 0:
        dist.recv(torch.empty(3))
    if way == "unreceived" and step == 3 and run.rank == 0:
        dist.isend(x, 1)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if way == "late" and run.rank < 2:
        # Only two of the ranks say something after the update.
        if run.rank:
            dist.send(loss.detach(), 0)
        else:
            dist.recv(loss.detach(), 1)
    return loss.detach()


losses = [float(train(step)) for step in range(arguments.steps)]
if run.rank == 0:
    dist.recv(torch.empty(1), 1)
elif run.rank == 1:
    dist.send(torch.ones(1), 0)
record(run.rank, state=state_digests(model=model, optimizer=optimizer), losses=losses)
