"""The examples run: briefly, with real faults, as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


@pytest.fixture(name="environment")
def _environment(tmp_path):
    return os.environ | {
        "TRAINONCE_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }


def launch(environment, *options):
    return subprocess.run(
        [sys.executable, "-m", "trainonce.cli.main", "run", "--nproc-per-node", "2", *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_opens_with_the_command_that_runs_it(example):
    text = example.read_text()
    assert len(text.splitlines()) <= 120
    docstring = text.split('"""')[1]
    assert re.search(rf"^    (trainonce run .*|python )examples/{example.name}", docstring, re.M)


def test_the_demo_survives_its_faults_and_draws_the_loss(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/demo.py", "--steps", "160", "--output", tmp_path / "out"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "died of SIGKILL at step 120" in done.stderr
    assert "moved on request" in done.stderr
    assert "All digests and all losses are equal" in done.stdout
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_images_example_gives_the_same_with_and_without_a_kill(environment):
    script = str(ROOT / "examples/02_images.py")
    clean = launch(environment, script, "--epochs", "1")
    faulty = launch(environment, "--chaos", "kill rank=1 step=20", script, "--epochs", "1")
    assert "best accuracy" in clean.stdout, clean.stderr
    assert "died of SIGKILL at step 20" in faulty.stderr
    assert faulty.stdout == clean.stdout


def test_the_gpt_example_runs_alone():
    script = ROOT / "examples/01_survive_a_kill.py"
    done = subprocess.run(
        [sys.executable, script, "--steps", "3", "--log-every", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["step", "1"], ["step", "2"], ["step", "3"], ["rank", "0"]
    ]  # fmt: skip


@pytest.mark.slow
def test_the_pipeline_example_gives_the_same_with_and_without_a_kill(environment):
    script = str(ROOT / "examples/09_pipeline.py")
    four = ("--nproc-per-node", "4", "--spares", "1")
    clean = launch(environment, *four, script, "--steps", "10")
    faulty = launch(environment, *four, "--chaos", "kill rank=3 step=6", script, "--steps", "10")
    assert clean.stdout.count("digest") == 4, clean.stderr
    assert "died of SIGKILL at step 6" in faulty.stderr
    assert sorted(faulty.stdout.splitlines()) == sorted(clean.stdout.splitlines())
