"""A small model in stages, with replicas of each or without; under any launcher.

Called as `pipeline.py SCHEDULE SYNC AXIS:SIZE…`, such as `pipeline.py 1f1b ddp pp:2 rep:2`. The
stages differ in their layers, so no two hold the same state.
"""

import argparse
import faulthandler

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.nn.parallel import DistributedDataParallel

import trainonce
from trainonce.testing import record, state_digests

WIDTH = 12
MICRO_BATCHES = 4
NUM_SAMPLES = 8
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}

torch.set_num_threads(1)
faulthandler.dump_traceback_later(150)
parser = argparse.ArgumentParser()
parser.add_argument("schedule", choices=SCHEDULES)
parser.add_argument("sync", choices=("ddp", "zero", "reduce", "hsdp", "none"))
parser.add_argument("axes", nargs="+")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--shapes", choices=("asked", "given"), default="asked")
parser.add_argument("--evaluate-every", type=int, default=0)
parser.add_argument("--verify-every", type=int, default=0)
parser.add_argument("--shadow-every", type=int, default=None)
parser.add_argument("--replicas", choices=("named", "unnamed"), default="named")
arguments = parser.parse_args()
axes = dict(each.split(":") for each in arguments.axes)

run = trainonce.init(seed=5)
torch.manual_seed(0)
mesh = init_device_mesh("cpu", tuple(map(int, axes.values())), mesh_dim_names=tuple(axes))
pipe = mesh.get_group("pp")
stages_a_rank = 2 if arguments.schedule == "interleaved" else 1
num_stages = stages_a_rank * mesh["pp"].size()
copies = mesh["rep"] if "rep" in axes else None


def layers(index):
    """One stage: [samples, WIDTH] to the same; each with an inner width of its own."""
    inner = WIDTH + 2 * index + 1
    return torch.nn.Sequential(
        torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, inner), torch.nn.GELU(),
        torch.nn.Dropout(0.1), torch.nn.Linear(inner, WIDTH),
    )  # fmt: skip


whole = [layers(index) for index in range(num_stages)]
mine = list(range(mesh.get_local_rank("pp"), num_stages, mesh["pp"].size()))
modules = [whole[index] for index in mine]
if arguments.sync in ("ddp", "zero"):
    modules = [DistributedDataParallel(m, process_group=copies.get_group()) for m in modules]
if arguments.sync == "hsdp":
    modules = [fully_shard(m, mesh=mesh["rep", "shard"]) for m in modules]


def shapes(index):
    """Samples of a micro-batch in and out, where the stages need not ask each other."""
    if arguments.shapes == "asked":
        return {}
    samples = NUM_SAMPLES // MICRO_BATCHES
    return {
        "input_args": torch.empty(samples, WIDTH, requires_grad=index > 0),
        "output_args": torch.empty(samples, WIDTH, requires_grad=True),
    }


stages = [
    PipelineStage(module, index, num_stages, torch.device("cpu"), group=pipe, **shapes(index))
    for module, index in zip(modules, mine, strict=True)
]
schedule = SCHEDULES[arguments.schedule](
    stages if stages_a_rank > 1 else stages[0], MICRO_BATCHES,
    loss_fn=torch.nn.functional.mse_loss,
)  # fmt: skip
parameters = [parameter for module in modules for parameter in module.parameters()]
if arguments.sync == "zero":
    optimizer = ZeroRedundancyOptimizer(
        parameters, torch.optim.AdamW, process_group=copies.get_group(), lr=1e-2
    )
else:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
options = {} if arguments.shadow_every is None else {"shadow_every": arguments.shadow_every}
if arguments.sync == "hsdp":
    options["replicas"] = mesh["rep", "shard"]
elif arguments.replicas == "named" and copies is not None:
    options["replicas"] = copies
elif arguments.replicas == "named":
    options["replicas"] = dist.new_subgroups(1)[0]
run.protect(
    models=dict(zip(map(str, mine), modules, strict=True)), optimizer=optimizer,
    verify_replicas_every=arguments.verify_every, **options,
)  # fmt: skip
first, last = 0 in mine, num_stages - 1 in mine


def data(step):
    copy = 0 if copies is None else mesh.get_local_rank("rep")
    generator = torch.Generator().manual_seed(1000 * step + copy)
    x = torch.randn(NUM_SAMPLES, WIDTH, generator=generator)
    return x, x.roll(1, 1).sin()


@run.step
def train(step):
    x, target = data(step)
    losses = []
    schedule.step(*([x] if first else []), target=target if last else None, losses=losses)
    if arguments.sync == "reduce":
        for parameter in parameters:
            dist.all_reduce(parameter.grad, group=copies.get_group())
            parameter.grad /= copies.size()
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(losses).mean().detach() if last else torch.zeros(())


@run.step
def evaluate(step):
    x, target = data(-1 - step)
    losses = []
    schedule.eval(*([x] if first else []), target=target if last else None, losses=losses)
    return torch.stack(losses).mean() if last else torch.zeros(())


losses = []
for step in range(arguments.steps):
    losses.append(float(train(step)))
    if arguments.evaluate_every and step % arguments.evaluate_every == 0:
        losses.append(float(evaluate(step)))


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


kept = optimizer.optim.state if arguments.sync == "zero" else optimizer.state
state = [
    {key: local(value) for key, value in kept.get(parameter, {}).items()}
    for parameter in parameters
]
record(
    run.rank, state=state_digests(parameters=[local(p) for p in parameters], optimizer=state),
    losses=losses,
)  # fmt: skip
