"""A loop that a counter of the script ends."""

import torch
from pieces import batch, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.protect(model=model, optimizer=optimizer)


@run.step
def train(epoch):
    x, y = batch(epoch, run.rank)
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


patience = 0
for epoch in run.epochs(20):
    train(epoch)
    patience += 1
    if patience == 6:
        break
