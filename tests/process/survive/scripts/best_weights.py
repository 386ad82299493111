"""Keeps the best weights in variables, as scripts do, and goes on from them now and then."""

import argparse
import copy
import math

import torch
from pieces import loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

options = argparse.ArgumentParser()
options.add_argument("--loop", choices=["epochs", "range"], default="epochs")
options.add_argument("--checkpoint-every", type=float)
options = options.parse_args()

run = trainonce.init(seed=4, checkpoint_every_s=options.checkpoint_every)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.BatchNorm1d(48)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
run.protect(model=model, optimizer=optimizer)


@run.step
def train(step):
    loss_of(model, step, run.rank).backward()
    optimizer.step()
    optimizer.zero_grad()


@run.step
def evaluate():
    model.eval()
    with torch.no_grad():
        value = loss_of(model.module, 1000, 0).item()  # the same on all ranks
    model.train()
    return value


@run.step
def go_back(weights, momentum):
    model.load_state_dict(weights)
    optimizer.load_state_dict(momentum)


class Keeper:
    def __init__(self):
        self.weights, self.momentum = None, None


best_value, best, keeper, worst = math.inf, None, Keeper(), []
for epoch in run.epochs(8) if options.loop == "epochs" else range(8):
    for step in range(3):
        train(3 * epoch + step)
    value = evaluate()
    if value < best_value:
        best_value = value
        best = copy.deepcopy(model.state_dict())
        keeper.weights = {name: each.clone() for name, each in model.module.state_dict().items()}
        keeper.momentum = copy.deepcopy(optimizer.state_dict())
    elif epoch > 4:
        worst = [each.detach().clone() for each in model.parameters()]
        go_back(best, keeper.momentum)

kept = [*best.values(), *keeper.weights.values(), *worst]
kept += [each for of in keeper.momentum["state"].values() for each in of.values()]
record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    kept=[round(best_value, 9), len(worst), [each.double().sum().item().hex() for each in kept]],
    steps=run.step_index,
)
