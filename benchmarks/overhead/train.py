"""The same training, plain under torchrun or with trainonce: what a window of steps takes.

MODE=plain|trainonce, MODEL as in `workload.build`, WARM_UP and STEPS; each rank writes one JSON
object to OUT.<rank>.
"""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from workload import batches, build, digest, trained

torch.set_num_threads(1)
TICKS = os.sysconf("SC_CLK_TCK")


def launcher_cpu_s() -> float:
    """Return the CPU seconds of the process that started this one: torchrun or trainonce."""
    fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


run = None
if os.environ["MODE"] == "trainonce":
    import trainonce

    run = trainonce.init()
else:
    dist.init_process_group("gloo")
net, size = build(os.environ["MODEL"])
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(trained(net), lr=1e-3)


def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = net.loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


if run is not None:
    run.protect(model=model, optimizer=optimizer)
    train_step = run.step(train_step)
rank, world_size = dist.get_rank(), dist.get_world_size()
warm_up, steps = int(os.environ["WARM_UP"]), int(os.environ["STEPS"])
source = batches(net.samples(4096), size, rank)
for _ in range(warm_up):
    train_step(*next(source))
begun = time.perf_counter(), time.process_time(), launcher_cpu_s()
times = []
for _ in range(steps):
    begun_s = time.perf_counter()
    loss = train_step(*next(source))
    times.append(time.perf_counter() - begun_s)
ended = time.perf_counter(), time.process_time(), launcher_cpu_s()
result = {
    "wall_s": ended[0] - begun[0],
    "cpu_s": ended[1] - begun[1],
    "launcher_cpu_s": ended[2] - begun[2],
    "median_step_s": sorted(times)[steps // 2],
    "parameters": sum(parameter.numel() for parameter in net.parameters()),
    "digest": digest(net.state_dict().values()),
    "loss": float(loss),
    "log_bytes": run._fabric.log_bytes()[1] if run is not None else 0,
}
Path(f"{os.environ['OUT']}.{rank}").write_text(json.dumps(result))
if run is None:
    dist.destroy_process_group()
