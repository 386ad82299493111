"""Process groups of the script's own: pairs of ranks, and a second group over all of them.

The second pair is made after `protect`, as evaluation code does.
"""

import torch
import torch.distributed as dist
from pieces import loss_of, mlp
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init(seed=2)
torch.manual_seed(0)
everyone = dist.new_group()
pair = dist.new_group([0, 1])
model = DDP(mlp(), process_group=everyone)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
run.protect(model=model, optimizer=optimizer)
later = dist.new_group([1, 2])


@run.step
def train(step):
    loss = loss_of(model, step, run.rank)
    loss.backward()
    shared = torch.full((2,), float(run.rank + step))
    if run.rank < 2:
        dist.all_reduce(shared, group=pair)
    if run.rank > 0:
        dist.all_reduce(shared, group=later)
    optimizer.step()
    optimizer.zero_grad()
    late = shared.clone()
    dist.all_reduce(late)
    run.state["shared"] = [*shared.tolist(), *late.tolist()]
    return loss.detach()


for step in range(12):
    train(step)

record(
    run.rank,
    state={**state_digests(model=model, optimizer=optimizer), **run.state},
    steps=run.step_index,
)
