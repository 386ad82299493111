"""Reports what it has of a step after the update, in the ways that scripts do."""

import sys

from pieces import small_job

import trainonce
from trainonce.testing import record

run = trainonce.init()
model, optimizer, loader = small_job(run, batch_size=4)


class Trainer:
    last = None

    def forward(self, x):
        self.last = model(x).square().mean()
        return self.last

    def update(self, loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


trainer = Trainer()


@run.step
def averaged(x):
    loss = trainer.forward(x)
    trainer.update(loss)
    return run.mean(loss)


@run.step
def returned(x):
    loss = model(x).square().mean()
    metrics = {"norm": x.norm()}
    trainer.update(loss)
    return {"loss": loss.detach(), "item": loss.item(), "pair": (metrics["norm"], None)}


@run.step
def attribute(x):
    trainer.update(trainer.forward(x))
    return trainer.last.item(), run.mean(trainer.last.item())


@run.step
def nothing(x):
    trainer.update(model(x).square().mean())


@run.step
def unknown(x):
    loss = model(x).square().mean()
    trainer.update(loss)
    return run.mean(2 * loss), (3 * loss).item(), x.mean(0).tolist()


def flat(value):
    if isinstance(value, dict):
        return [each for one in value.values() for each in flat(one)]
    if isinstance(value, (tuple, list)):
        return [each for one in value for each in flat(one)]
    return [value]


step = {f.__name__: f for f in (averaged, returned, attribute, nothing, unknown)}[sys.argv[1]]
history = []
for (x,) in run.batches(loader, max_steps=12):
    told = [each if each is None else float(each).hex() for each in flat(step(x))]
    history.append(told)
record(run.rank, history=history)
