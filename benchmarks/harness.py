"""What the benchmarks share: environment, step records, waiting for a job, result files.

Workers append a line a committed step (`rank step monotonic_ns pid`) to one file. All clocks
are CLOCK_MONOTONIC, which the processes of one host share, so that the parent's own kill is on
the same scale.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = [sys.executable, "-m", "trainonce.cli.main", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@dataclass(frozen=True)
class Record:
    """One committed step of one process."""

    rank: int
    step: int
    at_s: float
    pid: int


def read_records(path: Path) -> list[Record]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    fields = [line.split() for line in lines if line.endswith("\n")]
    return [Record(int(r), int(s), int(ns) / 1e9, int(pid)) for r, s, ns, pid in fields]


def write_record(fd: int, rank: int, step: int) -> None:
    """Append one record; a single write, so that lines of several processes do not mix."""
    os.write(fd, f"{rank} {step} {time.monotonic_ns()} {os.getpid()}\n".encode())


def open_records() -> int:
    """Open the file named by STEPS_FILE for appending."""
    return os.open(os.environ["STEPS_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def environment(**extra: object) -> dict[str, str]:
    """Return this process's environment with the package and the benchmarks on its path."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **{key: str(value) for key, value in extra.items()},
    }


def run_job(command: Sequence[str], **extra: object) -> str:
    """Run a launcher to its end in `environment(**extra)`; return what it wrote to stdout.

    Plain torch with gloo now and then aborts while it exits (torch 2.13): then it is run again.

    Raises:
        RuntimeError: It failed; with the end of what it wrote to stderr.
    """
    for _ in range(3):
        done = subprocess.run(
            command, env=environment(**extra), capture_output=True, text=True, check=False
        )
        if not done.returncode:
            return done.stdout
        if "terminate called without an active exception" not in done.stderr:
            break
    raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-3000:]}")


def wait_until(condition: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    """Return the first true value of `condition`, asked seldom: it takes from two cores."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)
    return found


def stop(process: subprocess.Popen[Any]) -> None:
    """End a launcher at once: the second signal does not wait for a checkpoint."""
    for signum in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5 if signum is signal.SIGINT else 30)
            return


def incidents(home: Path, job: str) -> list[dict[str, Any]]:
    """Return the incidents of `job` from its ledger."""
    text = subprocess.check_output(
        [sys.executable, "-m", "trainonce.cli.main", "report", job, "--json"],
        env=environment(TRAINONCE_HOME=home),
        text=True,
    )
    (found,) = json.loads(text)["jobs"]
    return [incident["event"] for incident in found["incidents"]]


def summary(values: Iterable[float]) -> dict[str, float]:
    """Return median, quartiles and range."""
    found = sorted(values)
    if len(found) == 1:
        found *= 2
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "min": found[0], "max": found[-1]}


def machine() -> dict[str, Any]:
    """Return what the results depend on, without names of hosts."""
    import torch

    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(one, 1) for one in os.getloadavg()],
    }


def commit() -> str:
    git = ["git", "-C", str(ROOT)]
    text = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    dirty = subprocess.check_output([*git, "status", "--porcelain", "src"], text=True).strip()
    return f"{text}-dirty" if dirty else text


def result_path(script: str, hardware: str) -> Path:
    """Return where the result of a run that begins now goes."""
    date = datetime.datetime.now(tz=datetime.UTC).date()
    folder = Path(script).resolve().parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date}_{hardware}_{commit()}.json"


def read_result(path: Path) -> dict[str, Any]:
    """Return what an earlier run at the same commit wrote, for a run that adds to it."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write or rewrite a result, with what it depends on."""
    record = {"machine": machine(), "commit": path.stem.rsplit("_")[-1], **result}
    path.write_text(json.dumps(record, indent=1) + "\n")


def without_paths(text: str) -> str:
    """Return `text` with no path of this machine: of the project, the environment and Python."""
    for path, name in ((sys.prefix, ".venv"), (sys.base_prefix, "python"), (str(ROOT), ".")):
        text = text.replace(path, name)
    return text


def default_hardware() -> str:
    return f"{os.cpu_count()}-core-cpu"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows (the first is the head) as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
