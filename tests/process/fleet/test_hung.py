"""A rank that hangs is named, and what all ranks were doing is kept."""

import json
from pathlib import Path

from trainonce.testing.jobs import run_job

SCRIPT = Path(__file__).parent / "hung.py"


def test_culprit_is_replaced_and_its_stack_and_the_open_collectives_are_kept(tmp_path):
    job = run_job(
        SCRIPT, nproc_per_node=2, spares=1, home=tmp_path, options=("--hang-timeout-s", "2")
    )
    job.assert_completed()
    (incident,) = job.incidents
    assert (incident.cause, incident.ranks, incident.step) == ("hang", [1], 5)
    job.assert_nothing_lost()
    # The thread that hangs holds the interpreter's lock: only a handler in C can see it.
    assert "in stuck_in_a_library" in job.stderr
    (logs,) = tmp_path.glob("jobs/*/logs")
    (table,) = logs.glob("hang_generation_?.txt")
    assert "replace ranks [1]" in table.read_text()
    (waiting,) = logs.glob("hang_generation_?_rank_0_collectives.json")
    entries = json.loads(waiting.read_text())["other"]["entries"]
    assert entries[-1]["profiling_name"] == "gloo:all_reduce"
    assert entries[-1]["state"] != "completed"
