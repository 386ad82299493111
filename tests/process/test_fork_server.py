"""A job whose processes are forked is like one whose processes are new, and is watched as well."""

import contextlib
import os
import select
import signal

import pytest

from trainonce.testing import jobs, run_job

SCRIPT = """
import os, signal, sys
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
import trainonce
from trainonce.testing import record

run = trainonce.init()
model = DDP(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.protect(model=model, optimizer=optimizer)

@run.step
def step():
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

for _ in range(3):
    step()
parent = open(f"/proc/{os.getppid()}/cmdline").read()
record(
    run.rank, forked="fork_server" in parent, mark=os.environ["MARK"], folder=os.getcwd(),
    main=sys.modules["__main__"].__file__, arguments=sys.argv[1:],
)
os.write(1, f"rank {run.rank}\\n".encode())  # print writes text and newline apart: ranks mix
if "leave" in sys.argv and run.rank == 1 and os.fork() == 0:
    os.setsid()
    signal.pause()
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Return a function that runs the script, by default in forked processes."""
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_LEAVE_S", 0.0)

    def run(*args, **options):
        home = tmp_path / f"home{len(list(tmp_path.iterdir()))}"
        return run_job(tmp_path / "train.py", *args, home=home, env={"MARK": "here"}, **options)

    return run


def test_a_forked_job_sees_what_one_of_new_processes_sees(job):
    forked, fresh = job("one", "2"), job("one", "2", fresh=True)
    assert forked.values("forked") == {0: True, 1: True}
    assert fresh.values("forked") == {0: False, 1: False}
    for result in (forked, fresh):
        assert result.exit_code == 0, result.explain()
        assert sorted(result.stdout.split("\n")) == ["", "rank 0", "rank 1"]
        assert "completed after 3 steps" in result.stderr
    for key in ("mark", "folder", "main", "arguments"):
        assert forked.values(key) == fresh.values(key)


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_process_that_is_left_behind_is_found_and_killed(job, fresh):
    result = job("leave", fresh=fresh)
    (left,) = result.leftovers
    with pytest.raises(AssertionError, match="left behind"):
        result.assert_completed()
    with contextlib.suppress(ProcessLookupError):
        ended = os.pidfd_open(int(left.split(":")[0]))
        select.select([ended], [], [])
        os.close(ended)


def test_a_launcher_that_is_killed_gives_its_signal(job):
    seen = []

    def kill(process):
        seen.append(process.poll())
        process.kill()

    assert job(watch=kill).exit_code == -signal.SIGKILL
    assert seen == [None]
