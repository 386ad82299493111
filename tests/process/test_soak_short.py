"""A short version of `benchmarks/soak`: the long one runs by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak" / "run.py"

JOBS = {
    "scaler": [
        "kill step=7 rank=1 point=backward",
        "raise step=15 rank=0 point=update",
        "reset step=25",
        "exit step=33 rank=1 point=between",
    ],
    "late collective": [
        "stop step=9 rank=0 point=collective",
        "kill step=20 rank=1 point=commit",
    ],
}


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak_run", SOAK)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SOAK.parents[1]))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SOAK.parents[1]))


@pytest.mark.parametrize(
    "kind", ["scaler", pytest.param("late collective", marks=pytest.mark.slow)]
)
def test_a_job_with_faults_ends_with_the_bits_of_its_twin(soak, kind):
    plan = JOBS[kind]
    twin = soak.run_job(kind, 2, [])
    job = soak.run_job(kind, 2, plan)
    assert soak.judge(job, plan, twin) == [], job["log"]
    assert set(twin["results"]) == {"0", "1"}
    assert len(job["fired"]) == len(plan)


def test_a_soak_that_found_something_says_what(soak):
    plan = ["kill step=1 rank=0 point=begin"]
    job = {"exit_code": 3, "results": {}, "steps_lost": 2, "fired": [], "not_injected": ["SIGABRT"]}
    wrong = soak.judge(job, plan, {"results": {"0": ["60", "ab"]}})
    assert len(wrong) == 5
