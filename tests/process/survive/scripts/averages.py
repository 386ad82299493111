"""Lists of averages, as scripts keep them: of an epoch, of all, in a dict, the best, in the step.

The second part does so where a step's averages are only known after its commit.
"""

from collections import defaultdict

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
loader = run.dataloader(dataset, batch_size=4, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader)
inside = []


@run.step
def train(x, y):
    loss = ((model(x) - y) ** 2).mean()
    mean = run.mean(loss)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return mean


@run.step
def noting(x, y):
    loss = ((model(x) - y) ** 2).mean()
    inside.append(run.mean(loss))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


history, epochs, best = defaultdict(list), [], None
for _ in run.epochs(4):
    losses = []
    for batch in run.batches(loader):
        loss = train(*batch)
        losses.append(loss)
        history["all"].append(loss)
    epochs.append(sum(map(float, losses)) / len(losses))
    if best is None or loss < best:
        best = loss
for batch in run.batches(loader):
    noting(*batch)

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    averages=[*epochs, best.item(), *(each.item() for each in (*history["all"], *inside))],
    steps=run.step_index,
    late=[step.profile.changes_late for step in (train, noting)],
    looks=[step.profile.looks_again for step in (train, noting)],
)
