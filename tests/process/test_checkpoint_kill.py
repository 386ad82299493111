"""A writer that is killed at any instant loses no checkpoint that it had committed."""

import json
import subprocess
import sys
from pathlib import Path

WRITER = Path(__file__).with_name("checkpoint_writer.py")


def run(mode: str, folder: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(WRITER), mode, str(folder)],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_writers_killed_at_random_instants_lose_nothing_they_committed(tmp_path: Path) -> None:
    result = run("random", tmp_path / "checkpoints")
    assert result["killed"] == 80
    assert result["unfinished"] > 0  # the kills did hit checkpoints in the making
    assert result["steps"] > 0


def test_a_writer_killed_at_each_of_its_file_operations_loses_nothing(tmp_path: Path) -> None:
    result = run("every", tmp_path / "checkpoints")
    assert result["killed"] > 30
    # The last writer ran to its end, and what the dead ones had left is gone.
    assert result["left"] == [f"step-{result['steps'] - 1:09d}"]


def test_a_full_disk_is_an_error_with_a_hint_and_spoils_nothing(tmp_path: Path) -> None:
    result = run("full", tmp_path / "checkpoints")
    assert len(result["errors"]) == 4
    assert all("hint: make room" in error for error in result["errors"])
    assert result["steps"] == 2
