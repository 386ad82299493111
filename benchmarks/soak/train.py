"""The ways to train that the soak goes through: KIND and STEPS in the environment."""

import contextlib
import hashlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import trainonce

torch.set_num_threads(1)
KIND, STEPS = os.environ["KIND"], int(os.environ["STEPS"])
run = trainonce.init(seed=7)
torch.manual_seed(0)
layers = [nn.Linear(32, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 96), nn.GELU()]
if KIND == "batchnorm":
    layers.insert(1, nn.BatchNorm1d(96))
net = nn.Sequential(*layers, nn.Linear(96, 1))
model = DistributedDataParallel(net, bucket_cap_mb=0.02)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=7)
table = torch.randn(997, 32, generator=torch.Generator().manual_seed(1))
samples = torch.utils.data.TensorDataset(table, (2 * table[:, :1]).sin(), torch.arange(997))
loader = run.dataloader(samples, batch_size=8, shuffle=True)
run.protect(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, loader=loader)


def loss_of(x, y):
    return nn.functional.mse_loss(model(x), y)


@run.step
def train_step(x, y, number):
    run.state["trained"] = run.state.get("trained", 0) + 1
    last = KIND != "accumulate" or run.state.get("calls", 0) % 3 == 2
    with contextlib.nullcontext() if last else model.no_sync():
        if KIND == "scaler":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(x, y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        else:
            loss = loss_of(x, y)
            loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if last:
        if KIND == "scaler":
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    metric = loss.detach().clone()
    if KIND == "late collective":
        dist.all_reduce(metric)
    return metric, number


@run.step
def evaluate():
    net.eval()
    with torch.no_grad():
        value = nn.functional.mse_loss(net(table), (2 * table[:, :1]).sin())
    net.train()
    run.state["best"] = min(run.state.get("best", 1e9), float(value))


for x, y, number in run.batches(loader, max_steps=STEPS):
    train_step(x, y, number)
    if KIND == "accumulate":
        run.state["calls"] = run.state.get("calls", 0) + 1
    if KIND == "evaluation" and run.state["trained"] % 10 == 0:
        evaluate()
state = hashlib.sha256()
for tensor in [*net.state_dict().values(), *(
    value for slots in optimizer.state.values() for _, value in sorted(slots.items())
)]:  # fmt: skip
    # BatchNorm's statistics and dropout differ by rank, so each rank has a digest of its own.
    state.update(tensor.numpy().tobytes())
state.update(repr((scheduler.state_dict()["last_epoch"], run.state.get("best"))).encode())
os.write(1, f"RESULT {run.rank} {run.step_index} {state.hexdigest()}\n".encode())
