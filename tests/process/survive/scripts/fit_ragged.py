"""`trainonce.fit` on sequences of many lengths, beside plain torch on the whole batch at once."""

import copy
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

import trainonce
from trainonce import settings
from trainonce.levers.fit import fit
from trainonce.levers.host import settle_plan
from trainonce.testing import record, state_digests

SAMPLES, LENGTH, STEPS, PADDING = 24, 12, 6, -100


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 8), torch.nn.GELU(),
                               torch.nn.Linear(8, 7))  # fmt: skip


def data():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(7, (SAMPLES, LENGTH), generator=generator)
    targets = (tokens * 3 + 1) % 7
    lengths = torch.arange(SAMPLES) % LENGTH + 1
    targets[torch.arange(LENGTH) >= lengths[:, None]] = PADDING
    return tokens, targets


def losses(out, batch):
    found = F.cross_entropy(out.transpose(1, 2), batch[1], ignore_index=PADDING, reduction="none")
    return found.sum(1)


def count(batch):
    return (batch[1] != PADDING).sum(1)


def plain(loss):
    """Train without levers on all the data at once."""
    model, batch = make_net(), data()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(STEPS):
        loss(model(batch[0]), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


run = trainonce.init(seed=3)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), SAMPLES)
path = settings.home() / "jobs" / str(settings.JOB.get()) / "mine.toml"
model = make_net()
optimizer = torch.optim.SGD(model.parameters(), 1.0)


def make():
    made = trainonce.plan(
        copy.deepcopy(model), loader, losses, optimizer=optimizer, count=count, steps=STEPS,
        world_size=2,
    )  # fmt: skip
    made = made.override("precision", mode="tf32").override("schedule", on=False)
    made = made.override("sequence-warmup", on=False)
    return dataclasses.replace(made, run=dataclasses.replace(made.run, micro_batch=5))


found = fit(
    model, loader, losses, eval=data(), count=count, optimizer=optimizer,
    plan=settle_plan(Path(path), make), seed=3,
)  # fmt: skip
mean = plain(lambda out, batch: losses(out, batch).sum() / count(batch).sum())
with torch.no_grad():
    left = float(losses(mean(data()[0]), data()).sum() / count(data()).sum())
record(
    run.rank,
    state=state_digests(model=model),
    to_mean_of_tokens=distance(model, mean),
    to_mean_of_means=distance(
        model, plain(lambda out, batch: (losses(out, batch) / count(batch)).mean())
    ),
    value=found.value,
    plain_value=left,
)
