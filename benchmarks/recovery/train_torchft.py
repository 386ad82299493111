"""Trains until it is stopped, with torchft as its README shows: one record a committed step."""

import os
from datetime import timedelta

import torch
from harness import open_records, write_record
from torch.distributed import TCPStore
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from workload import batches, build, trained

torch.set_num_threads(1)
replica = int(os.environ["REPLICA"])
net, size = build(os.environ["MODEL"])
inner = torch.optim.AdamW(trained(net), lr=1e-3)


def state() -> dict:
    return {"model": net.state_dict(), "optimizer": inner.state_dict()}


def load(found: dict) -> None:
    net.load_state_dict(found["model"])
    inner.load_state_dict(found["optimizer"])


store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
    state_dict=state,
    load_state_dict=load,
    min_replica_size=1,
    replica_id=f"replica_{replica}",
    rank=0,
    world_size=1,
    store_addr="127.0.0.1",
    store_port=store.port,
    lighthouse_addr=os.environ["LIGHTHOUSE"],
    hostname="127.0.0.1",
)
model = DistributedDataParallel(manager, net)
optimizer = Optimizer(manager, inner)
records = open_records()
for x, y in batches(net.samples(4096), size, replica):
    optimizer.zero_grad()
    before = manager.current_step()
    net.loss(model(x), y).backward()
    optimizer.step()
    if manager.current_step() > before:
        # Steps of a single replica are told apart by their number of participants.
        write_record(records, replica * 10 + manager.num_participants(), manager.current_step())
