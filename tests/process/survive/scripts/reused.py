"""A DDP that is used three times in a step, as a GAN's judge is, and a spare that rehearses it.

Rank 0 waits at step 10 until all spares are ready.
"""

import json
import os
import sqlite3
import threading

import torch
from pieces import WIDTH, batch, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=7)
torch.manual_seed(0)
judge, maker = DDP(mlp(), bucket_cap_mb=0.005), DDP(mlp(WIDTH), bucket_cap_mb=0.005)
optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (judge, maker)]
data = torch.utils.data.TensorDataset(batch(0, 0, 64)[0])
loader = run.dataloader(data, batch_size=4)
run.protect(judge=judge, maker=maker, optimizers=optimizers, loader=loader)


@run.step
def evaluate(batches):
    """Take a loader, which a rehearsal cannot know."""
    with torch.no_grad():
        return [float(judge.module(x).mean()) for (x,) in run.batches(batches, max_steps=2)]


@run.step
def train(x):
    made = maker(torch.randn_like(x))
    (judge(x) - judge(made.detach())).square().mean().backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    judge(made).square().mean().backward()
    optimizers[1].step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def spares_are_parked():
    with sqlite3.connect(os.path.join(os.environ["TRAINONCE_HOME"], "ledger.sqlite")) as ledger:
        rows = ledger.execute("SELECT kind, record FROM events")
        events = [(kind, json.loads(record)) for kind, record in rows]
    wanted = sum(record["spares"] for kind, record in events if kind == "job_started")
    return sum(kind == "spare_parked" for kind, _ in events) >= wanted


poll = threading.Event()
for (x,) in run.batches(loader, max_steps=20):
    if run.step_index == 10 and run.rank == 0:
        while not spares_are_parked():
            poll.wait(0.05)
    train(x)
evaluate(loader)
record(
    run.rank,
    state=state_digests(judge=judge, maker=maker, optimizers=optimizers),
    steps=run.step_index,
)
