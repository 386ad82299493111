"""Code between steps that changes protected state and run.state, draws, and communicates."""

import torch
import torch.distributed as dist
from pieces import batch, loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

ROUNDS = 8
run = trainonce.init(seed=5)
torch.manual_seed(0)
model = DDP(mlp(1, torch.nn.Dropout(0.1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)
run.protect(model=model, optimizer=optimizer, scheduler=scheduler)
history = run.state.setdefault("history", [])
best = run.state.setdefault("best", {"at": 0, "weights": torch.zeros(24)})


@run.step
def train(step):
    loss = loss_of(model, step, run.rank)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@run.step
def evaluate(step):
    x, y = batch(100 + step, 0)
    with torch.no_grad():
        return run.mean(((model(x) - y) ** 2).mean())


for step in range(ROUNDS):
    dist.barrier()
    loss = train(step)
    gathered = [torch.zeros(()) for _ in range(run.world_size)]
    dist.all_gather(gathered, loss)
    scheduler.step()
    run.state["rounds"] = run.state.get("rounds", 0) + 1
    best["weights"].add_(step)
    score = evaluate(step)
    total = torch.stack(gathered).sum()
    dist.all_reduce(total)
    history.append([float(score), float(total), float(torch.rand(1)), scheduler.get_last_lr()[0]])
    best["at"] += 1

record(
    run.rank,
    state=state_digests(model=model, optimizer=optimizer, scheduler=scheduler),
    user=state_digests(state=dict(run.state)),
    history=history,
    steps=run.step_index,
)
