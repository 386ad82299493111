"""The kernel kills a rank that takes more memory than its control group may have."""

import os
from pathlib import Path

import pytest

from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "memory.py"
LIMIT_BYTES = 3 << 30
_ROOT = Path("/sys/fs/cgroup")


@pytest.fixture
def limited():
    """A control group with a memory limit; skips where this process may not make one."""
    version_1 = (_ROOT / "memory" / "memory.limit_in_bytes").exists()
    parent = _ROOT / "memory" if version_1 else _ROOT
    group = parent / f"trainonce-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if version_1 else "memory.max")
        limit.write_text(str(LIMIT_BYTES))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


def test_a_rank_killed_for_its_memory_is_rebuilt_and_the_cause_is_named(limited, tmp_path):
    calm = run_job(SCRIPT, home=tmp_path / "calm")
    calm.assert_completed()

    def join_group(process):
        (limited / "cgroup.procs").write_text(str(process.pid))

    filled = tmp_path / "filled"
    result = run_job(
        SCRIPT, spares=1, home=tmp_path / "limited", env={"FILLED": str(filled)},
        watch=join_group, fresh=True,  # the fork server is not in the control group
    )  # fmt: skip
    result.assert_completed()
    assert filled.exists()
    (incident,) = result.incidents
    assert (incident.cause, incident.ranks, incident.steps_lost) == ("oom", [1], 0)
    assert incident.served_by == "rebuild"
    result.assert_same_state(calm)
