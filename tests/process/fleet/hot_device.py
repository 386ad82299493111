"""Trains; the device of worker 1 grows hotter with every step, and dies at one of them.

The death is tied to the worker: whoever holds its rank elsewhere by then does not meet it.
`signals` gets the temperatures, or "" for a device that gives no warning.
"""

import json
import os
import signal
import socket
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing.records import record, state_digests

signals, dies_at, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ON_THE_HOT_DEVICE = os.environ.get("TRAINONCE_WORKER") == "1"

run = trainonce.init()
torch.manual_seed(0)
model = DDP(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(), torch.nn.Linear(16, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
loader = run.dataloader(data, batch_size=4, shuffle=True)
run.protect(model=model, optimizer=optimizer, loader=loader)
run.expect_saving("precision", 0.25, basis="a bench of ours")


def heat(step):
    """Tell the temperature: three degrees a minute, ten seconds of the device's time a step."""
    reading = {
        "mono_s": 10.0 * step, "host": socket.gethostname(), "device": "worker1",
        "temperature_c": 50 + 0.5 * step, "slowdown_c": 87, "shutdown_c": 92,
    }  # fmt: skip
    with open(signals, "a") as file:
        file.write(json.dumps(reading) + "\n")


@run.step
def train_step(x, y):
    if ON_THE_HOT_DEVICE and run.step_index == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


for x, y in run.batches(loader, max_steps=steps):
    train_step(x, y)
    if signals and ON_THE_HOT_DEVICE and run.step_index <= 80:
        heat(run.step_index)
    if dies_at >= 0:
        time.sleep(0.005)  # a step of a real model takes its time, too: a spare gets ready
record(run.rank, state=state_digests(model=model, optimizer=optimizer), steps=run.step_index)
