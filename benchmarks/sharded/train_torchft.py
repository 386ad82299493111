"""The training of train.py as torchft's HSDP: FSDP2 inside a replica group, its manager between.

One torchrun a group of ranks, REPLICA its number, LIGHTHOUSE the address. The gradients of each
`fully_shard` are averaged over the groups by the hook that torch offers for it. WARM_UP, STEPS
and OUT as in train.py; with STEPS_FILE set it trains until it is stopped, and the first rank of
each group records each committed step under `10 * REPLICA + participants`.
"""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from harness import open_records, write_record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchft import Manager, Optimizer, ProcessGroupGloo
from workload import batches, build, trained

torch.set_num_threads(1)
replica, rank = int(os.environ["REPLICA"]), int(os.environ["RANK"])
dist.init_process_group("gloo")
ranks = dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
model, size = build(os.environ["MODEL"])
for block in model.blocks.layers if hasattr(model, "blocks") else model.body:
    if trained(block):
        fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
# FSDP2 puts others in their place while a layer computes, and torchft reads the state then.
parameters = list(model.parameters())
inner = torch.optim.AdamW(parameters, lr=1e-3)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state() -> dict:
    """Return this rank's shards: the same rank of another group loads them."""
    moments = [
        {key: local(value) for key, value in inner.state[parameter].items()}
        for parameter in parameters
    ]
    return {"parameters": [local(each).detach() for each in parameters], "moments": moments}


def load(found: dict) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, found["parameters"], strict=True):
            local(parameter).copy_(value)
        for parameter, values in zip(parameters, found["moments"], strict=True):
            for key, value in values.items():
                mine = inner.state[parameter]
                if key not in mine:
                    like = parameter.detach()
                    mine[key] = value.clone() if value.ndim == 0 else torch.zeros_like(like)
                local(mine[key]).copy_(value)


manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
    state_dict=state,
    load_state_dict=load,
    min_replica_size=1,
    replica_id=f"replica_{replica}",
    lighthouse_addr=os.environ["LIGHTHOUSE"],
    hostname="127.0.0.1",
)
for module in model.modules():
    if isinstance(module, FSDPModule):
        module.set_all_reduce_hook(lambda gradient: manager.allreduce(gradient).wait() and None)
optimizer = Optimizer(manager, inner)


def train_step(x: torch.Tensor, y: torch.Tensor) -> bool:
    optimizer.zero_grad()
    before = manager.current_step()
    model.loss(model(x), y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return manager.current_step() > before


source = batches(model.samples(4096), size, (replica * ranks + rank) % 4)
if "STEPS_FILE" in os.environ:
    records = open_records()
    while True:
        if train_step(*next(source)) and rank == 0:
            who = replica * 10 + manager.num_participants()
            write_record(records, who, manager.current_step())
together = 0  # steps since both groups are there, which both count alike
while together < int(os.environ["WARM_UP"]):
    train_step(*next(source))
    together += manager.num_participants() == 2
begun, times, alone = time.process_time(), [], 0
for _ in range(int(os.environ["STEPS"])):
    begun_s = time.perf_counter()
    train_step(*next(source))
    times.append(time.perf_counter() - begun_s)
    alone += manager.num_participants() < 2
result = {
    "cpu_s": time.process_time() - begun,
    "median_step_s": sorted(times)[len(times) // 2],
    "steps_alone": alone,
}
Path(f"{os.environ['OUT']}.{replica * ranks + rank}").write_text(json.dumps(result))
os._exit(0)
