"""The two promises together: ranks that share a store, and one of them dies."""

import os
from pathlib import Path

from trainonce.testing import run_job

SCRIPT = Path(__file__).with_name("train_on_rows.py")


def test_ranks_compute_each_result_once_and_a_kill_changes_nothing(tmp_path):
    jobs = []
    for name, chaos in (("calm", ""), ("shaken", "kill rank=1 step=9 point=backward")):
        log = tmp_path / f"{name}-log"
        log.mkdir()
        job = run_job(
            SCRIPT, nproc_per_node=2, spares=1, chaos=chaos, home=tmp_path / name,
            env={"LOG": os.fspath(log)},
        )  # fmt: skip
        job.assert_completed()
        assert (log / "prepared").read_text() == "x"
        assert sum(map(int, (log / "rows").read_text().split())) == 512
        jobs.append(job)
    calm, shaken = jobs
    shaken.assert_fired("kill", rank=1, step=9, cause="signal", served_by="rebuild")
    shaken.assert_nothing_lost()
    shaken.assert_same_state(calm)
