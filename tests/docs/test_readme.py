"""What the README shows is what happens."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(language):
    found = BLOCK.findall((ROOT / "README.md").read_text())
    return [text for name, text in found if name == language]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    program, once, fit = blocks("python")
    (folder / "fit.py").write_text(fit)
    (folder / "train.py").write_text(program)
    (folder / "once.py").write_text(once)
    return folder


def call(folder, command, *options, threads="1"):
    environment = os.environ | {
        "TRAINONCE_HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": threads,
    }
    if not threads:
        del environment["OMP_NUM_THREADS"]
    done = subprocess.run(
        [sys.executable, *command, *options],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def masked(line):
    """Leave out what depends on the machine: ids, times, the last digits, a spare's readiness."""
    line = re.sub(r"a (spare|new worker) took", "… took", line)
    line = re.sub(r"paused [\d.]+ m?s", "paused …", line)
    line = re.sub(r"\d{4}-\d{6}-\w{4}", "JOB", line)
    return re.sub(r"pid \d+|0\.\d+", "…", line)


def test_the_program_of_the_readme_gives_the_output_of_the_readme_with_and_without_a_fault(folder):
    losses = []
    for block in blocks("console"):
        command, *expected = block.splitlines()
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "trainonce"
        # As on a user's machine: the launcher chooses the number of threads, and says so.
        lines = call(folder, ["-m", "trainonce.cli.main", *arguments], threads="")
        shown = [masked(line) for line in lines]
        for line in expected:
            assert masked(line) in shown
        losses.append([line for line in lines if line.startswith("step ")])
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_the_program_of_the_readme_runs_under_plain_python(folder):
    assert sum(line.startswith("step ") for line in call(folder, ["train.py"])) == 3


def test_the_second_run_of_the_program_that_computes_once_computes_nothing(folder):
    (shown,) = blocks("text")
    assert [*call(folder, ["once.py"]), *call(folder, ["once.py"])] == shown.splitlines()


def test_the_last_program_of_the_readme_plans_and_trains(folder):
    last = call(folder, ["fit.py"])[-1]
    assert float(re.search(r"loss ([\d.]+)", last)[1]) < 0.05
    assert "plan.toml" in last


def test_six_lines_of_the_program_name_trainonce():
    program, *_ = blocks("python")
    marks = ("trainonce.init", "run.dataloader", "run.protect", "@run.step", "run.mean",
             "run.batches")  # fmt: skip
    for mark in marks:
        assert program.count(mark) == 1


def test_the_make_targets_of_the_readme_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    named = [line.split()[1] for block in blocks("sh") for line in block.splitlines()]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)
