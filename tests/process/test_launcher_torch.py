"""Scripts written for torchrun, under `trainonce run`: the real store, real gloo."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import trainonce

SCRIPT = """
import os, sys
import torch, torch.distributed as dist
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.init_process_group("gloo")
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
if attempt < int(sys.argv[1]):
    os.kill(os.getpid(), 9) if dist.get_rank() == 1 else dist.recv(value, 1)
# One write, which the other rank's cannot split.
os.write(1, f"rank {dist.get_rank()} sum {value.item()} attempt {attempt}\\n".encode())
dist.destroy_process_group()
"""


def run(tmp_path, *args):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    before, after = args[: args.index("--")], args[args.index("--") + 1 :]
    return subprocess.run(
        [sys.executable, "-m", "trainonce.cli.main", "run", "--nproc-per-node", "2", *before,
         "--no-python", sys.executable, script, *after],
        env={
            **os.environ,
            "TRAINONCE_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(Path(trainonce.__file__).parents[1]),
        },
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_torchrun_script_runs_unchanged_and_is_restarted_up_to_max_restarts(tmp_path):
    done = run(tmp_path, "--max-restarts", "1", "--", "1")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "rank 0 sum 3.0 attempt 1",
        "rank 1 sum 3.0 attempt 1",
    ]
    assert done.stderr.count("does not call trainonce.init()") == 1
    assert "died of SIGKILL" in done.stderr


def test_a_torchrun_script_without_restarts_left_fails_the_job(tmp_path):
    done = run(tmp_path, "--", "5")
    assert done.returncode == 1
    assert signal.SIGKILL.name in done.stderr
    assert "Traceback" not in done.stderr.split("trainonce: job")[-1]


def test_a_master_port_in_use_is_told_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "--master-port", str(port), "--", "0")
    assert done.returncode == 2
    assert f"error: port {port} on 127.0.0.1 cannot be used" in done.stderr
    assert "hint: " in done.stderr
