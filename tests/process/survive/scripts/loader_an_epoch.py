"""A loader and a step that are made anew in each epoch, a loader in each fold, one at the end.

By `run.dataloader`, as a `DataLoader`, and as one that keeps its own place.
"""

import copy
import gc
import weakref

import torch
from pieces import WIDTH, mlp
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.protect(model=model, optimizer=optimizer)
x = torch.randn(24, WIDTH)
dataset = [(i, each, each.sum().sin()) for i, each in enumerate(x)]
made, living = [], []


class OwnPlace:
    """Batches of a rank's own, each epoch in another order; it can go on at any of them."""

    def __init__(self, rank):
        self.rank, self.epoch, self.at = rank, 0, 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state):
        self.epoch, self.at = state["epoch"], state["at"]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch))
        while self.at < 3:
            self.at += 1
            ids = 2 * order[4 * self.at - 4 : 4 * self.at] + self.rank
            yield ids, x[ids], x[ids].sum(1).sin()
        self.at = 0


def kept(loader):
    """Take note of a loader without holding it."""
    made.append(weakref.ref(loader))
    living.append(sum(each() is not None for each in made))
    return loader


def trainer():
    """Return a step, a new one each time."""

    @run.step
    def train(place, ids, x, y):
        loss = ((model(x).squeeze(1) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = run.state.setdefault("seen", {})
        seen.setdefault(place, []).append(ids.tolist())

    return train


def fold(number):
    for epoch in run.epochs(2):
        loader, train = kept(run.dataloader(dataset, batch_size=4, shuffle=True)), trainer()
        for batch in run.batches(loader):
            train(f"fold {number} epoch {epoch}", *batch)
    own, train = kept(OwnPlace(run.rank)), trainer()
    for epoch in range(2):
        for batch in run.batches(own):
            train(f"fold {number} own {epoch}", *batch)


for number in run.epochs(3):
    fold(number)
train = trainer()
for epoch in range(2):
    loader = kept(DataLoader(dataset, batch_size=4, shuffle=True))
    for batch in run.batches(loader):
        train(f"plain {epoch}", *batch)
last = kept(run.dataloader(dataset, batch_size=4, shuffle=True))
for batch in run.batches(last, max_steps=5):
    train("last", *batch)
for batch in run.batches(last):
    train("once more", *batch)

del loader, last
gc.collect()
record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    seen=copy.deepcopy(run.state["seen"]),
    living=max(living),
    left=sum(each() is not None for each in made),
    watched=len(run._sources._loaders),
    profiles=len(run._runner.profiles.to_record()),
    steps=run.step_index,
)
