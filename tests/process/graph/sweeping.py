"""A sweep whose steps are logged; kills itself at a step of a trial when told to."""

import os
import signal
import sys

import torch

import trainonce as once

STORE, LOG, KILL_AT = sys.argv[1], sys.argv[2], int(sys.argv[3])


def build(hyper):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.1)}


def step(objects, hyper, index):
    with open(LOG, "a") as log:
        log.write(f"{index} {hyper['lr']}\n")
    if index == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    objects["optimizer"].param_groups[0]["lr"] = hyper["lr"]
    objects["optimizer"].zero_grad()
    objects["model"](torch.randn(8, 4)).square().mean().backward()
    objects["optimizer"].step()


def judge(objects):
    return float(objects["model"].weight.detach().sum())


# The log's name and the fault are no part of what is computed.
segment = once.Segment(build, step, evaluate=judge, version="1")
trials = [segment.trial(40, lr={0: 0.1, at: 0.01}) for at in (20, 25, 30, 35)]
sys.stdin.readline()
report = once.sweep(trials, store=STORE, save_every=10)
print(report.steps_computed, report.steps_elsewhere, [r.value for r in report.results])
print([segment.run(trial)[1] for trial in trials] if KILL_AT == -2 else "")
