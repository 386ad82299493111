"""Evaluations every few steps, by `run.step_index` and by counts of the script's own."""

import torch
from pieces import WIDTH, descend
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import TensorDataset

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(torch.nn.Linear(WIDTH, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loader = run.dataloader(TensorDataset(torch.randn(80, WIDTH)), batch_size=4, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader)


@run.step
def train(x):
    return descend(model, optimizer, x).item()


@run.step
def evaluate():
    return model.module.weight.detach().sum().item()


class Best:
    def __init__(self):
        self.value, self.times = 1e9, 0

    def see(self, value):
        self.value, self.times = min(self.value, value), self.times + 1


global_step, seen, curve, callbacks = 0, 0.0, [], [Best(), Best()]
for _ in run.epochs(3):
    for (x,) in run.batches(loader):
        global_step += 1
        seen += train(x)
        if global_step % 3 == 0:
            callbacks[0].see(evaluate())
        if run.step_index % 4 == 0:
            curve.append((run.step_index, seen, evaluate()))
    if global_step % 10 == 0:
        callbacks[1].see(evaluate())

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    variables=[global_step, seen, curve, [vars(each) for each in callbacks]],
    steps=run.step_index,
)
