"""The same sharded training, plain under torchrun or with trainonce: a window of steps.

MODE=plain|trainonce, MODEL as in `workload.build`, MESH such as rep:2,shard:2, WARM_UP, STEPS,
SHADOW (steps from one shadow copy to the next); each rank writes one JSON object to OUT.<rank>.
With STEPS_FILE set it trains until it is stopped, and records each committed step there.
"""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from harness import open_records, write_record
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from workload import batches, build, digest, trained

torch.set_num_threads(1)
run = None
if os.environ["MODE"] == "trainonce":
    import trainonce

    run = trainonce.init()
else:
    dist.init_process_group("gloo")
axes = dict(each.split(":") for each in os.environ["MESH"].split(","))
mesh = init_device_mesh("cpu", tuple(map(int, axes.values())), mesh_dim_names=tuple(axes))
model, size = build(os.environ["MODEL"])
for block in model.blocks.layers if hasattr(model, "blocks") else model.body:
    if trained(block):
        fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(trained(model), lr=1e-3)


executed = 0


def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    global executed  # a rank that takes over skips the steps that are committed
    executed += 1
    loss = model.loss(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


shadow_s = {"copying": 0.0, "copying_cpu": 0.0, "waiting": 0.0}
if run is not None:
    shadow = os.environ.get("SHADOW")
    run.protect(
        model=model, optimizer=optimizer, shadow_every=None if shadow is None else int(shadow)
    )
    train_step = run.step(train_step)
    keeper = run._runner.shadow
    write, wait = keeper._write, keeper.wait

    def timed_write(*args) -> None:
        begun_s, begun_cpu_s = time.perf_counter(), time.thread_time()
        write(*args)
        shadow_s["copying"] += time.perf_counter() - begun_s
        shadow_s["copying_cpu"] += time.thread_time() - begun_cpu_s

    def timed_wait() -> None:
        begun_s = time.perf_counter()
        wait()
        shadow_s["waiting"] += time.perf_counter() - begun_s

    keeper._write, keeper.wait = timed_write, timed_wait
rank = dist.get_rank()
warm_up, steps = int(os.environ["WARM_UP"]), int(os.environ["STEPS"])
source = batches(model.samples(4096), size, rank % 4)
if "STEPS_FILE" in os.environ:
    records = open_records()
    for step in range(1_000_000):
        before = executed
        train_step(*next(source))
        if executed > before:
            write_record(records, rank, step)
for _ in range(warm_up):
    train_step(*next(source))
for key in shadow_s:
    shadow_s[key] = 0.0
begun = time.perf_counter(), time.process_time()
times = []
for _ in range(steps):
    begun_s = time.perf_counter()
    loss = train_step(*next(source))
    times.append(time.perf_counter() - begun_s)
ended = time.perf_counter(), time.process_time()
of_shadow = {f"shadow_{key}_s": seconds for key, seconds in shadow_s.items()}


def median_s(action, times: int = 15) -> float:
    taken = []
    for _ in range(times):
        begun_s = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begun_s)
    return sorted(taken)[times // 2]


# The two ways to keep a rank from committing a step that others still need: wait for them, or
# keep what the update changes.
ways = {}
if run is not None:
    ways["barrier_s"] = median_s(dist.barrier)
    ways["image_s"] = median_s(run._runner.protected.image)
    ways["image_bytes"] = run._runner.protected.num_bytes()
result = {
    **ways,
    **of_shadow,
    "wall_s": ended[0] - begun[0],
    "cpu_s": ended[1] - begun[1],
    "median_step_s": sorted(times)[steps // 2],
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "shard_bytes": sum(parameter.to_local().nbytes for parameter in model.parameters()),
    "digest": digest(parameter.to_local() for parameter in model.parameters()),
    "log_bytes": run._fabric.log_bytes()[1] if run is not None else 0,
    "shadow_every": run._runner.shadow.every if run is not None else 0,
}
Path(f"{os.environ['OUT']}.{rank}").write_text(json.dumps(result))
if run is None:
    dist.destroy_process_group()
