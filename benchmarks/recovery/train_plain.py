"""Plain DDP under torchrun, with a checkpoint every so many steps: one record a step."""

import os

import torch
import torch.distributed as dist
from harness import open_records, write_record
from torch.nn.parallel import DistributedDataParallel
from workload import batches, build, trained

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
net, size = build(os.environ["MODEL"])
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(trained(net), lr=1e-3)
checkpoint, every = os.environ["CHECKPOINT"], int(os.environ["CHECKPOINT_EVERY"])
step = 0
if os.path.exists(checkpoint):
    state = torch.load(checkpoint, mmap=True)
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step = state["step"]
records = open_records()
for x, y in batches(net.samples(4096), size, rank):
    net.loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    write_record(records, rank, step)
    if step % every == 0:
        if rank == 0:
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, checkpoint + ".new")
            os.replace(checkpoint + ".new", checkpoint)
        dist.barrier()
