"""`trainonce run --smoke` and its budgets: before anything starts, and when enough was spent."""

import os
import subprocess
import sys
from pathlib import Path

import trainonce

TRAIN = """
import sys, torch
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    model(torch.randn(5, int(sys.argv[1]))).square().mean().backward()
    optimizer.step()
print("trained to the end")
"""


def launch(tmp_path, *arguments):
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(trainonce.__file__).parents[1]),
        "TRAINONCE_HOME": str(tmp_path / "home"),
    }
    return subprocess.run(
        [sys.executable, "-m", "trainonce.cli.main", "run", *map(str, arguments)],
        env=env, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


def test_a_smoke_test_lets_a_sound_script_start_and_keeps_a_broken_one_from_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    good = launch(tmp_path, "--smoke", script, "3")
    assert good.returncode == 0, good.stderr
    assert "smoke test passed: 2 updates, inputs [[[5, 3]]], 8 parameters" in good.stderr
    assert good.stdout.count("trained to the end") == 1
    jobs = sorted((tmp_path / "home" / "jobs").iterdir())
    bad = launch(tmp_path, "--smoke", script, "4")
    assert bad.returncode == 1
    assert "failed on the CPU" in bad.stderr
    assert "hint:" in bad.stderr
    assert sorted((tmp_path / "home" / "jobs").iterdir()) == jobs


def test_a_job_ends_cleanly_when_its_budget_is_spent(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text("import signal\nsignal.pause()\n")
    done = launch(tmp_path, "--max-hours", "0.0002", script)  # 0.7 s, less than it takes to start
    assert done.returncode == 143, done.stderr
    assert "the budget is spent" in done.stderr
    assert "--resume" in done.stderr


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_starts(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text("")
    for option, words in (("--max-cost-usd", "usd_per_gpu_hour"), ("--max-hours", "above 0")):
        value = "5" if option == "--max-cost-usd" else "0"
        done = launch(tmp_path, option, value, script)
        assert done.returncode == 2
        assert words in done.stderr
