"""Epochs as people write them: set-up of an epoch, batches, a scheduler, an evaluation, a line."""

import torch
import torch.distributed as dist
from pieces import mlp, sines
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.Dropout(0.1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)
dataset = sines()
loader = run.dataloader(dataset, batch_size=8, shuffle=True)
run.protect(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)


@run.step
def train(x, y, weight):
    loss = weight * ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@run.step
def evaluate():
    model.eval()
    with torch.no_grad():
        x, y = dataset.tensors
        errors = ((model(x) - y) ** 2).mean()
    model.train()
    dist.all_reduce(errors)
    return float(errors)


lines = []
for epoch in run.epochs(4):
    dist.barrier()
    weight = torch.rand(1)
    dist.broadcast(weight, 0)  # drawn by rank 0 for all
    for batch in run.batches(loader):
        loss = train(*batch, weight)
    total = loss.clone()
    dist.all_reduce(total)
    scheduler.step()
    error = evaluate()
    objects = [None] * run.world_size
    dist.all_gather_object(objects, (run.rank, epoch, error))
    lines.append((epoch, float(loss), float(total), error, float(weight), objects))

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer, scheduler=scheduler),
    line=lines[-1],
    lines={line[0]: line for line in lines},
    steps=run.step_index,
)
