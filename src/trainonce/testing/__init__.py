"""For users' own tests: run a real job with faults, and compare how it ends.

See docs/testing.md. `run_job` starts `trainonce run` and returns a `JobResult`; the script
calls `record` and `state_digests` to tell its end state. `Fault` and `parse_plan` are the
fault plans of `--chaos`, `FakeClock` is a clock that stands still until it is told to move.
"""

from trainonce.clock import FakeClock
from trainonce.testing.jobs import JobResult, fork_server, run_job
from trainonce.testing.records import record, state_digests
from trainonce.wire.faults import Fault, parse_plan

__all__ = [
    "FakeClock", "Fault", "JobResult", "fork_server", "parse_plan", "record", "run_job",
    "state_digests",
]  # fmt: skip
