"""A small model under FSDP2 on a mesh, in the ways people train it; under any launcher.

Called as `sharded.py WAY AXIS:SIZE…`, such as `sharded.py plain rep:2 shard:2`.
"""

import argparse
import faulthandler

import torch
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import trainonce
from trainonce.testing import record, state_digests

WIDTH = 16

torch.set_num_threads(1)
faulthandler.dump_traceback_later(150)
parser = argparse.ArgumentParser()
parser.add_argument("way")
parser.add_argument("axes", nargs="+")
parser.add_argument("--shadow-every", type=int, default=None)
parser.add_argument("--steps", type=int, default=14)
parser.add_argument("--verify-every", type=int, default=0)
arguments = parser.parse_args()
way = arguments.way
axes = dict(each.split(":") for each in arguments.axes)


TENSOR_PARALLEL = int(axes.get("tp", 1))
# Splits unevenly where it can.
INNER = 2 * WIDTH + (1 if TENSOR_PARALLEL == 1 else 0)


class Block(torch.nn.Module):
    """Width in, width out; dropout and running statistics make ranks differ."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, INNER)
        self.down = torch.nn.Linear(INNER, WIDTH)
        self.dropout = torch.nn.Dropout(0.1 if TENSOR_PARALLEL == 1 else 0.0)

    def forward(self, x):
        """Take and give [samples, WIDTH]."""
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


run = trainonce.init(seed=3)
torch.manual_seed(0)
mesh = init_device_mesh(
    "cpu", tuple(int(size) for size in axes.values()), mesh_dim_names=tuple(axes)
)
model = torch.nn.Sequential(
    torch.nn.Linear(WIDTH, WIDTH),
    torch.nn.BatchNorm1d(WIDTH) if way != "mixed" else torch.nn.GELU(),
    Block(), Block(), torch.nn.Linear(WIDTH, 1),
)  # fmt: skip
options = {"mesh": mesh["rep", "shard"] if "tp" in axes else mesh}
if way == "mixed":
    options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
if way == "offload":
    options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
if way == "recompute":
    checkpoint_wrapper.apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, Block)
    )
if way == "compiled":
    for index in (2, 3):
        model[index].compile(backend="aot_eager")
if TENSOR_PARALLEL > 1:
    for index in (2, 3):
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model[index], mesh["tp"], plan)
if way == "zero":
    model = DistributedDataParallel(model)
else:
    for index in (2, 3):
        fully_shard(model[index], **options)
    fully_shard(model, **options)
# With parameters on meshes of several kinds, torch's foreach kernels refuse.
foreach = way != "mixed" and TENSOR_PARALLEL == 1
if way == "zero":
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=foreach)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
extra = {} if arguments.shadow_every is None else {"shadow_every": arguments.shadow_every}
run.protect(
    model=model, optimizer=optimizer, schedule=schedule,
    verify_replicas_every=arguments.verify_every, **extra,
)  # fmt: skip


def loss_of(step):
    generator = torch.Generator().manual_seed(1000 * step + run.rank // TENSOR_PARALLEL)
    x = torch.randn(6, WIDTH, generator=generator)
    return ((model(x).float() - x.sum(dim=1, keepdim=True).sin()) ** 2).mean()


def update():
    if way in ("plain", "clipping", "accumulate"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


@run.step
def train(step):
    if way == "accumulate":
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            loss = loss_of(3 * step + micro) / 3
            loss.backward()
    else:
        loss = loss_of(step)
        loss.backward()
    update()
    return loss.detach()


@run.step
def train_across(step):
    """Each call is one micro-batch; every third one updates."""
    last = step % 3 == 2
    model.set_requires_gradient_sync(last)
    (loss_of(step) / 3).backward()
    if last:
        update()


function = train_across if way == "across" else train
for step in range(arguments.steps if way != "across" else 3 * arguments.steps):
    function(step)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def kept_state():
    return optimizer.optim.state if way == "zero" else optimizer.state


def digests(part):
    kept = kept_state()
    state = [
        {key: part(value) for key, value in kept.get(parameter, {}).items()}
        for parameter in model.parameters()
    ]
    return state_digests(
        parameters={name: part(each) for name, each in model.named_parameters()},
        optimizer=state, schedule=schedule,
    )  # fmt: skip


record(
    run.rank,
    state={**digests(local), **state_digests(buffers=dict(model.named_buffers()))},
    whole=digests(whole),
    by_parameter={
        name: state_digests(state=kept_state()[each])
        for name, each in model.named_parameters()
        if way == "zero" and each in kept_state()
    },
    steps=run.step_index,
)
