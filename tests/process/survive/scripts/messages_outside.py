"""A rank that sends more between two steps than is kept, to one that receives it all later."""

import torch
import torch.distributed as dist
from pieces import descend, small_job

import trainonce
from trainonce.testing import record, state_digests
from trainonce.worker import journal, oplog

oplog.MOST_OUTSIDE, oplog.MOST_OUTSIDE_BYTES, journal.MEASURED_EVERY = 32, 1 << 12, 16
SENT = [float(number) for number in range(80)]
run = trainonce.init()
model, optimizer, loader = small_job(run, batch_size=8)


@run.step
def train(x):
    descend(model, optimizer, x)


for (x,) in run.batches(loader, max_steps=3):
    if run.step_index == 0:
        works = [dist.isend(torch.full((64,), each), 1) for each in SENT if run.rank == 0]
        dist.barrier()
        got = [torch.empty(64) for _ in SENT if run.rank == 1]
        for each in got:
            dist.recv(each, 0)
        record(run.rank, got=[each.unique().tolist() for each in got])
    train(x)
record(run.rank, state=state_digests(model=model, optimizer=optimizer), steps=run.step_index)
