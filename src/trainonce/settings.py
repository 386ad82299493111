"""Every TRAINONCE_* environment variable, and where the package keeps its files.

Each component owns one frozen dataclass for its own settings; this module holds what more
than one of them reads.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EnvVar:
    """One environment variable: its name and what it means."""

    name: str
    meaning: str

    def get(self) -> str | None:
        """Return its value, or None where it is unset or empty."""
        return os.environ.get(self.name) or None


HOME = EnvVar("TRAINONCE_HOME", "folder of the ledger, checkpoints and logs (~/.trainonce)")
STORE = EnvVar("TRAINONCE_STORE", "folder or URL of the graph's store ($TRAINONCE_HOME/store)")
PROJECT = EnvVar("TRAINONCE_PROJECT", "project tag under which the ledger books a job")
PRECISION = EnvVar("TRAINONCE_PRECISION", "default precision lever for a whole cluster")
PRELOAD = EnvVar("TRAINONCE_PRELOAD", "0: start spares afresh, not by a fork (1)")

# Set by the launcher for its workers; users do not set these.
JOB = EnvVar("TRAINONCE_JOB", "set by the launcher: id of the job")
WORKER = EnvVar("TRAINONCE_WORKER", "set by the launcher: id of this worker within the job")
CONTROL_FD = EnvVar("TRAINONCE_CONTROL_FD", "set by the launcher: socket to the controller")
PROGRESS_FD = EnvVar("TRAINONCE_PROGRESS_FD", "set by the launcher: shared progress page")
SPARE = EnvVar("TRAINONCE_SPARE", "set by the launcher: 1 in a worker that holds no rank yet")

TEST_RECORDS = EnvVar("TRAINONCE_TEST_RECORDS", "set by trainonce.testing: folder for records")

ALL = (
    HOME, STORE, PROJECT, PRECISION, PRELOAD, JOB, WORKER, CONTROL_FD, PROGRESS_FD, SPARE,
    TEST_RECORDS,
)  # fmt: skip


def home() -> Path:
    """Return the folder of ledger, checkpoints and logs. It may not exist yet."""
    return Path(HOME.get() or Path.home() / ".trainonce").expanduser()
