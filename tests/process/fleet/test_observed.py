"""What a job finds out about itself: a slow transform, hot spots, a slow rank."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainonce.testing.jobs import run_job

SCRIPT = Path(__file__).parent / "observed.py"


def of_kind(job, kind):
    return [event for event in job.events if event.kind == kind]


@pytest.mark.slow
def test_slow_transform_and_hot_spots_are_in_ledger_and_report(tmp_path):
    job = run_job(
        SCRIPT, 50, 0.022, "none", nproc_per_node=1, options=("--profile-s", "1"), home=tmp_path
    )
    job.assert_completed()
    (slow,) = of_kind(job, "loader_slow")
    assert slow.slowest.startswith("blur (observed.py:")
    assert slow.sample_s >= 0.020
    assert slow.waited_share > 0.3
    assert "prepare it offline" in job.stderr
    spots = of_kind(job, "hot_spots")
    assert spots
    assert any(name.startswith("aten::") for name, _ in spots[0].spots)
    said = subprocess.run(
        [sys.executable, "-m", "trainonce.cli.main", "report", "last", "--home", tmp_path],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "mostly in blur (observed.py:" in said
    assert "hot spots on the processor in epoch 0: " in said


@pytest.mark.slow
def test_slow_rank_of_a_real_job_is_named():
    job = run_job(SCRIPT, 200, 0.0, 1, nproc_per_node=3)
    job.assert_completed()
    found = of_kind(job, "straggler_found")
    assert 1 in [event.rank for event in found]
    slow = next(event for event in found if event.rank == 1)
    assert slow.cause == "computing"
    assert 0.03 < slow.excess_s < 0.09
