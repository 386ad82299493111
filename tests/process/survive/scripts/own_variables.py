"""Loops that are steered by variables of the script: at its top, in a function, of an object.

One goes through two loaders at once, one counts its batches.
"""

import numpy as np
import torch
from pieces import mlp, sines
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
dataset = sines()
loader = run.dataloader(dataset, batch_size=8, shuffle=True)
other = run.dataloader(dataset, batch_size=4, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader, other=other)


@run.step
def train(x, y):
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return run.mean(loss.detach())


best, patience, history, seen = 1e9, 0, [], {"batches": 0}
for _ in run.epochs(20):
    total, count = torch.zeros(()), 0
    for batch in run.batches(loader):
        total += float(train(*batch))
        count += 1
        seen["batches"] += 1
    history.append(float(total) / count)
    best = min(best, history[-1])
    patience += 1
    if patience == 3:
        break
top = [best, patience, history, seen]


def fit(limit):
    steps, smooth = 0, np.float64(0.0)
    for _ in run.epochs(100):
        for pair in zip(run.batches(loader), run.batches(other), strict=False):
            loss = train(*map(torch.cat, zip(*pair, strict=True)))
            smooth = 0.9 * smooth + 0.1 * float(loss)
            steps += 1
        if steps >= limit:
            break
    return steps, float(smooth)


class Trainer:
    def __init__(self):
        self.steps, self.losses = 0, []

    def fit(self):
        for index, batch in enumerate(run.batches(loader, max_steps=20)):
            self.one(batch)
            self.losses.append(index)
            if self.steps == 7:
                break

    def one(self, batch):
        loss = train(*batch)
        self.losses.append(float(loss))
        self.steps += 1


in_function = fit(9)
trainer = Trainer()
trainer.fit()
record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    variables=[*top, *in_function, trainer.steps, trainer.losses],
    steps=run.step_index,
)
