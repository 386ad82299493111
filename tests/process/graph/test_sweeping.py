"""Sweeps of several processes: each stage is trained once, and SIGKILL loses one stage at most."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import trainonce

HERE = Path(__file__).parent
SOURCE = Path(trainonce.__file__).parents[1]
# The trunk to 35, and what is left of each trial after its decay.
TREE = 35 + 20 + 15 + 10 + 5


def start(store, log, kill_at=-1):
    return subprocess.Popen(
        [sys.executable, HERE / "sweeping.py", store, log, str(kill_at)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps(log):
    return log.read_text().splitlines()


def test_two_processes_share_a_sweep_and_train_each_stage_once(tmp_path):
    log = tmp_path / "log"
    children = [start(tmp_path / "store", log) for _ in range(2)]
    outputs = [child.communicate("\n")[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert len(steps(log)) == TREE
    computed = [int(lines[0].split()[0]) for lines in outputs]
    assert sum(computed) == TREE
    values = [lines[0].split(" ", 2)[2] for lines in outputs]
    assert values[0] == values[1]


def test_a_sweep_that_is_killed_goes_on_from_its_last_stage_with_equal_results(tmp_path):
    log, store = tmp_path / "log", tmp_path / "store"
    killed = start(store, log, kill_at=33)
    killed.communicate("\n")
    assert killed.returncode == -signal.SIGKILL
    before = len(steps(log))
    again = start(store, tmp_path / "again", kill_at=-2)
    values, alone = again.communicate("\n")[0].splitlines()
    assert again.returncode == 0
    assert values.split(" ", 2)[2] == alone
    trained = int(values.split()[0])
    assert len(steps(tmp_path / "again")) == trained + 4 * 40  # `run` trains each alone
    assert TREE <= before + trained <= TREE + 10  # no more than one stage twice
