"""Three steps an iteration, the last of which sets the rate by an average of the first."""

import torch
from pieces import WIDTH, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=4)
torch.manual_seed(0)
x = torch.randn(96, WIDTH)
data = torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True).sin())
net = mlp(1)
model = DDP(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
loader = run.dataloader(data, batch_size=4, shuffle=True)
run.protect(model=model, optimizer=optimizer, plateau=plateau, loader=loader)


@run.step
def train(x, y):
    loss = ((model(x) - y) ** 2).mean()
    average = run.mean(loss.detach())  # before the last collective: it is exact whatever happens
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return average, run.mean(1.0)


@run.step
def weigh():
    with torch.no_grad():
        return float(sum(parameter.sum() for parameter in net.parameters()))


@run.step
def steer(value):
    plateau.step(value)


seen, averages = 0, []
for x, y in run.batches(loader, max_steps=12):
    average, ones = train(x, y)
    weigh()
    steer(float(average))
    seen += int(float(ones))
    averages.append(float(average))

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer, plateau=plateau),
    steps=run.step_index,
    averages=averages,
    seen=seen,
)
