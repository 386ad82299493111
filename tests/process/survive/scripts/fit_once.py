"""`trainonce.fit` with levers, in a job: planned by rank 0, followed by all."""

import sys
from pathlib import Path

import torch
from pieces import WIDTH

import trainonce
from trainonce import settings
from trainonce.levers.fit import fit
from trainonce.levers.host import settle_plan
from trainonce.testing import record, state_digests


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 32), torch.nn.BatchNorm1d(32), torch.nn.GELU(),
        torch.nn.Dropout(0.1), torch.nn.Linear(32, 1),
    )  # fmt: skip


def data(samples):
    x = torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(samples))
    return x, x.sum(1, keepdim=True).tanh()


def square(out, batch):
    return (out - batch[1]).square().mean(1)


SETTINGS = {
    "infobatch": {"num_epochs": 9},
    "noise-scale": {"every": 3, "most": 4, "smoothing": 0.5},
    "recompute": {},
}

run = trainonce.init(seed=3)
levers = sys.argv[1:]
path = settings.home() / "jobs" / str(settings.JOB.get()) / "mine.toml"


def make():
    made = trainonce.plan(make_net(), data(160), square, steps=40, world_size=2)
    made = made.override("precision", mode="tf32")
    for lever in levers:
        made = made.override(lever, on=True, **SETTINGS[lever])
    return made


plan = settle_plan(Path(path), make)
model = make_net()
found = fit(model, data(160), square, eval=data(48), plan=plan, seed=3)
record(
    run.rank,
    state=state_digests(model=model),
    history=found.history,
    steps=found.steps,
    best=found.best,
    weights=found.weights.exists(),
)
