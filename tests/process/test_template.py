"""Spares are forked from a process that has torch imported, where that makes no difference."""

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from trainonce.engines.base import ExitStatus, LaunchSpec
from trainonce.engines.local import LocalEngine
from trainonce.testing import run_job

# Ends in the way that its argument says, or waits to be killed.
WORKER = """
import os, signal, sys
if sys.argv[1] == "wait":
    signal.pause()
print(os.environ["MARK"], "torch" in sys.modules, os.getsid(0) == os.getpid(), flush=True)
sys.exit(int(sys.argv[1]))
"""

JOB = """
import os, sys
if "early" in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["SET_BEFORE_TORCH"] = "1"
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
import trainonce
from trainonce.testing import record, state_digests

run = trainonce.init()
torch.manual_seed(0)
model = DDP(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.protect(model=model, optimizer=optimizer)

@run.step
def step(index):
    model(torch.full((2, 4), float(index + run.rank))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

for index in range(12):
    step(index)
parent = open(f"/proc/{os.getppid()}/cmdline").read().split("\\0")
record(run.rank, state=state_digests(model=model), forked="trainonce.worker.template" in parent)
"""


@pytest.fixture
def engine():
    engine = LocalEngine()
    yield engine
    engine.close()


@pytest.fixture
def start(engine, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def spec(*args):
        return LaunchSpec(
            worker=1,
            command=(sys.executable, "-u", "-m", "trainonce.worker", str(script), *args),
            env={**os.environ, "MARK": "here", "OMP_NUM_THREADS": "1"},
            stdout=tmp_path / "out",
        )

    def prepare(*args):
        engine.preload(spec(*args))
        while engine.preparing:
            select.select([], [], [], 0.02)
        return engine.start(spec(*args))

    prepare.again = lambda *args: engine.start(spec(*args))
    return prepare


def end_of(process):
    select.select([process.exit_fd], [], [])
    status = process.reap()
    process.close()
    return status


def test_a_forked_worker_has_its_own_environment_session_and_exit_code(start, tmp_path):
    assert end_of(start("3")) == ExitStatus(code=3)
    assert (tmp_path / "out").read_text() == "here True True\n"


def test_a_forked_worker_can_be_killed_and_the_next_one_started(start):
    process = start("wait")
    process.signal_group(signal.SIGKILL)
    assert end_of(process) == ExitStatus(signum=signal.SIGKILL)
    again = start.again("wait")
    again.signal_group(signal.SIGTERM)
    assert end_of(again) == ExitStatus(signum=signal.SIGTERM)


def test_without_its_template_a_worker_is_started_afresh(engine, start, tmp_path):
    orphan = start("wait")
    os.kill(engine._template.pid, signal.SIGKILL)
    orphan.signal_group(signal.SIGKILL)
    assert end_of(orphan).code == -1  # who could know is gone
    assert end_of(start.again("wait-not")) == ExitStatus(code=1)
    assert (tmp_path / "out").read_text() == "here False True\n"


def test_a_command_that_is_not_ours_has_no_template(engine):
    engine.preload(LaunchSpec(worker=0, command=("sh", "-c", "true")))
    assert not engine.preparing


@pytest.mark.parametrize("early", [False, True])
def test_spares_are_forked_unless_the_script_changes_the_environment_first(tmp_path, early):
    script = Path(tmp_path / "train.py")
    script.write_text(JOB)
    result = run_job(
        script, *["early"] * early, spares=1, chaos="kill rank=1 step=8 point=backward", fresh=True,
        home=tmp_path / "home",
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("kill", rank=1, cause="signal", served_by="rebuild")
    assert result.values("forked") == {0: False, 1: not early}
