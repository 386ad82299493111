"""An evaluation between two steps that issues more collectives than are kept."""

import torch.distributed as dist
from pieces import descend, small_job

import trainonce
from trainonce.testing import record, state_digests
from trainonce.worker import journal, oplog

oplog.MOST_OUTSIDE, journal.MEASURED_EVERY = 32, 16
run = trainonce.init()
model, optimizer, loader = small_job(run, batch_size=2)


@run.step
def train(x):
    descend(model, optimizer, x)


for (x,) in run.batches(loader, max_steps=12):
    if run.step_index == 4:
        for _ in range(200):
            dist.all_reduce(x)
        record(run.rank, kept=sum(map(len, run._fabric.world.ops.values())))
    train(x)
record(run.rank, state=state_digests(model=model, optimizer=optimizer), steps=run.step_index)
