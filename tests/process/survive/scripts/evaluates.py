"""BatchNorm, epochs of the script's own, and evaluations through DDP with sums between steps."""

import torch
import torch.distributed as dist
from pieces import WIDTH, mlp
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import TensorDataset

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.BatchNorm1d(48), torch.nn.Dropout(0.1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
x = torch.randn(64, WIDTH)
dataset = TensorDataset(x, x.sum(dim=1, keepdim=True).sin())
loader = run.dataloader(dataset, batch_size=8, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader)


@run.step
def train(x, y):
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


errors = []
for _ in range(4):
    model.train()
    for batch in run.batches(loader):
        loss = train(*batch)
    model.eval()
    total = torch.zeros(())
    with torch.no_grad():
        for start in (0, 32):
            part = slice(start, start + 32)
            total += ((model(x[part]) - dataset.tensors[1][part]) ** 2).sum()
    dist.all_reduce(total)
    errors.append(float(total))

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer),
    variables=errors,
    steps=run.step_index,
)
