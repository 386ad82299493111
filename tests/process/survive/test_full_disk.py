"""A log that no longer fits costs its own lines, and nothing of the training."""

import subprocess

import pytest


@pytest.fixture
def small(tmp_path):
    """A file system with room for 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_training_outlives_a_full_disk_under_its_log_and_a_kill_there(small, shaken):
    faults = ["kill rank=1 step=12 point=backward"]
    result = shaken("chatty.py", faults=faults, options=("--log-dir", str(small), "--tee", "3"))
    assert result.stderr.count("no longer fits where it is kept") == 1, result.explain()
    kept = list(small.glob("*/attempt_0/*/stdout.log"))
    assert {path.parent.name for path in kept} >= {"0", "1"}
    room = sum(path.stat().st_size for path in kept)
    assert 0 < room < 2 * 16 * 4000  # less than what was printed
