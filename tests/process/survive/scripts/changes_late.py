"""A step that goes on to change what its rank keeps to itself, after its last collective."""

import torch
from pieces import WIDTH
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
model = DDP(net)
average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
loader = run.dataloader(TensorDataset(torch.randn(96, WIDTH)), batch_size=4, shuffle=True)
run.protect(model=model, average=average, optimizer=optimizer, loader=loader)
run.state["weight"] = torch.ones(())


class Trainer:
    def __init__(self):
        self.updates = 0
        self.step = run.step(self.train)

    def train(self, x):
        loss = run.state["weight"] * (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        if run.rank == 1:
            run.state["weight"] = 0.5 * run.state["weight"] + 0.5 / (1 + loss.detach())
        self.updates += 1


trainer = Trainer()
for (x,) in run.batches(loader):
    trainer.step(x)

record(
    run.rank,
    state=state_digests(model=model, average=average, optimizer=optimizer, own=run.state["weight"]),
    updates=trainer.updates,
    steps=run.step_index,
)
