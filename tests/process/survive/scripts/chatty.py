"""Prints a few kilobytes after each step."""

from pieces import descend, small_job

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=1)
model, optimizer, loader = small_job(run, 4)


@run.step
def train(x):
    descend(model, optimizer, x)


for (x,) in run.batches(loader, max_steps=16):
    train(x)
    print("-" * 4000, run.step_index, flush=run.step_index % 2 == 0)

record(run.rank, state=state_digests(model=model, optimizer=optimizer), steps=run.step_index)
