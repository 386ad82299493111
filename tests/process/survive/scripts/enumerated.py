"""Counts its batches by itself if told to: `enumerated.py count`."""

import sys

from pieces import descend, small_job

import trainonce

run = trainonce.init()
model, optimizer, loader = small_job(run, batch_size=4)


@run.step
def step(x):
    descend(model, optimizer, x)


if "count" in sys.argv:
    for _, (x,) in enumerate(run.batches(loader)):
        step(x)
else:
    for (x,) in run.batches(loader):
        step(x)
