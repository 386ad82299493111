"""What stored results saved is in the ledger, beside the incidents."""

import json
import os
import subprocess
import sys
from pathlib import Path

import trainonce

SOURCE = Path(trainonce.__file__).parents[1]
PROGRAM = """
import sys, time, trainonce as once

@once.node(threads=2)
def slow(n):
    time.sleep(0.3)
    return n

print(once.compute(slow(1), slow(1)), once.compute(slow(2)))
"""


def report(home):
    command = [sys.executable, "-m", "trainonce.cli.main", "report", "--json"]
    return json.loads(subprocess.check_output(command, env=environment(home), text=True))


def environment(home, **extra):
    return os.environ | {"TRAINONCE_HOME": str(home), "PYTHONPATH": str(SOURCE)} | extra


def test_the_first_use_of_each_result_in_a_job_is_booked_with_its_seconds_and_joules(tmp_path):
    script, home = tmp_path / "main.py", tmp_path / "home"
    script.write_text(PROGRAM)
    run = [sys.executable, str(script)]
    subprocess.run(run, env=environment(home), check=True)
    assert report(home)["jobs"] == []  # all was computed, nothing saved
    subprocess.run(run, env=environment(home), check=True)
    (job,) = report(home)["jobs"]
    assert job["facts"]["summary"]["script"] == str(script)
    assert job["facts"]["summary"]["outcome"] == "completed"
    assert job["economics"]["gpu_hours"] == 0
    saved_s = 3600 * job["economics"]["graph_saved_gpu_hours"]
    assert 0.5 < saved_s < 0.7  # each result once, less reading it
    assert abs(job["economics"]["graph_saved_j"] - saved_s * 2 * 6.0) < 0.01


def test_under_the_launcher_the_saving_belongs_to_the_job(tmp_path):
    script, home = tmp_path / "main.py", tmp_path / "home"
    script.write_text(PROGRAM)
    for _ in range(2):
        subprocess.run(
            [sys.executable, str(script)], env=environment(home, TRAINONCE_JOB="j1"), check=True
        )
    (job,) = report(home)["jobs"]
    assert job["facts"]["summary"]["job"] == "j1"
    assert 0.5 < 3600 * job["economics"]["graph_saved_gpu_hours"] < 0.7
