"""Run a real job as a test does: launch it, wait for it, and look at what happened.

A test of a training script runs it twice: once as it is, once with faults. Then it asserts
that the faults fired and that both runs end in the same state::

    calm = run_job("train.py", nproc_per_node=2)
    shaken = run_job("train.py", nproc_per_node=2, spares=1, chaos="kill rank=0 step=5")
    shaken.assert_fired("kill", rank=0, step=5, cause="signal")
    shaken.assert_same_state(calm)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

import trainonce
from trainonce import settings
from trainonce.events import Event, FaultInjected, Incident, JobEnded, ValueLost
from trainonce.ledger.store import Ledger
from trainonce.testing.fork_server import ForkServer, name_of
from trainonce.testing.records import read_records

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from trainonce.testing.fork_server import ForkedProcess

Launcher = Literal["trainonce", "torchrun", "python"]

_LEAVE_S = 30.0
_POLL_S = 0.05
_servers: list[ForkServer] = []


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a job did and left.

    Args:
        command: How it was started.
        exit_code: Of the launcher; minus the signal's number if one ended it.
        stdout: What the ranks printed.
        stderr: What the launcher said, and the ranks' stderr.
        home: The TRAINONCE_HOME it ran with.
        job: Its id.
        events: What is in the ledger, in order; empty under torchrun and python.
        records: What the script recorded with `record`, by rank.
        leftovers: Processes of the job that were still there when it should have been over,
            as "pid: command line". They have been killed.
    """

    command: list[str]
    exit_code: int
    stdout: str
    stderr: str
    home: Path
    job: str
    events: list[Event]
    records: dict[int, list[dict[str, Any]]]
    leftovers: list[str]

    @property
    def incidents(self) -> list[Incident]:
        """The incidents in the ledger, in order."""
        return [event for event in self.events if isinstance(event, Incident)]

    @property
    def faults(self) -> list[FaultInjected]:
        """The faults of the plan that fired, in order."""
        return [event for event in self.events if isinstance(event, FaultInjected)]

    @property
    def unfired(self) -> list[str]:
        """The faults of the plan that did not fire, as entries of a plan."""
        return [each for e in self.events if isinstance(e, JobEnded) for each in e.unfired]

    @property
    def values_lost(self) -> int:
        """How many return values of steps came back as `trainonce.LOST`."""
        return sum(isinstance(event, ValueLost) for event in self.events)

    def values(self, key: str) -> dict[int, Any]:
        """Return by rank the last value that was recorded under `key`."""
        return {
            rank: [each[key] for each in records if key in each][-1]
            for rank, records in self.records.items()
            if any(key in each for each in records)
        }

    def explain(self) -> str:
        """Return what a failing test should show: the command, the faults and the output."""
        facts = [
            f"{type(e).__name__}{dataclasses.asdict(e)}" for e in (*self.faults, *self.incidents)
        ]
        return "\n".join(
            (
                f"{' '.join(self.command)}: exit code {self.exit_code}",
                *facts,
                self.stdout,
                self.stderr,
            )
        )

    def assert_completed(self) -> None:
        """Assert that the job ended normally and left no process behind."""
        assert self.exit_code == 0, self.explain()
        assert not self.leftovers, f"left behind: {self.leftovers}\n{self.explain()}"

    def assert_fired(self, action: str, *, times: int = 1, **where: Any) -> None:
        """Assert that a fault fired, and that the launcher saw what it did.

        Args:
            action: Of the fault: "kill", "stop", and so on.
            times: How often.
            **where: Fields that the fault or its incident must have: `rank`, `step`, `point`;
                `cause`, `detected_by`, `served_by` and the other fields of `Incident`, which
                are looked up in the incident of the process that was hit.
        """
        of_fault = {k: v for k, v in where.items() if k in ("rank", "step", "point", "pid")}
        of_incident = {k: v for k, v in where.items() if k not in of_fault}
        fired = [f for f in self.faults if f.fault == action and _has(f, of_fault)]
        assert len(fired) == times, (
            f"{action} {of_fault} fired {len(fired)} times, not {times}\n{self.explain()}"
        )
        if not of_incident:
            return
        for fault in fired:
            seen = [i for i in self.incidents if not fault.pid or fault.pid in i.pids]
            assert any(_has(incident, of_incident) for incident in seen), (
                f"{action} {of_fault} led to no incident with {of_incident}\n{self.explain()}"
            )

    def assert_same_state(self, other: JobResult, key: str = "state") -> None:
        """Assert that both jobs recorded the same under `key`, on every rank, at last.

        Args:
            other: The job to compare with.
            key: What the script recorded, usually `state=state_digests(...)`.
        """
        mine, theirs = self.values(key), other.values(key)
        assert theirs, f"nothing was recorded as {key}\n{other.explain()}"
        different = _differences(mine, theirs)
        assert not different, f"other {key}: {different}\n{self.explain()}"

    def assert_nothing_lost(self) -> None:
        """Assert that no committed step was computed again."""
        lost = [incident for incident in self.incidents if incident.steps_lost]
        assert not lost, self.explain()


@contextlib.contextmanager
def fork_server(*preload: str) -> Generator[None]:
    """Let `run_job` start jobs in a tenth of the time, until the context is left.

    Launcher and workers are forked from one process that has torch imported, instead of
    importing it each. What is killed, rebuilt and compared is the same; what no longer differs
    between ranks is the seed of Python's hashes. Jobs under "torchrun" and "python" start as ever.

    Args:
        preload: More modules that the scripts import.
    """
    with ForkServer(preload, {**os.environ, **_ENVIRONMENT}) as server:
        _servers.append(server)
        try:
            yield
        finally:
            _servers.remove(server)


def run_job(
    script: str | Path,
    *args: object,
    nproc_per_node: int = 2,
    spares: int = 0,
    chaos: str = "",
    launcher: Launcher = "trainonce",
    options: tuple[str, ...] = (),
    job: str = "",
    home: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240.0,
    watch: Callable[[subprocess.Popen[str] | ForkedProcess], None] | None = None,
    fresh: bool = False,
) -> JobResult:
    """Run `script` to its end as a real job, and return what happened.

    Args:
        script: The training script.
        *args: Its arguments.
        nproc_per_node: Ranks; ignored under "python".
        spares: Hot spares.
        chaos: Fault plan, as `trainonce run --chaos` takes it.
        launcher: "trainonce"; or "torchrun" or "python", for comparisons.
        options: More options of the launcher.
        job: Name of the job, for one that is asked about while it runs, or gone on with; one of
            its own by default.
        home: TRAINONCE_HOME of the job; a new folder under the temporary one by default.
        env: Variables to add to the environment.
        timeout_s: After so long the job is killed, children included.
        watch: Called with the launcher's process once it runs, for faults from outside.
        fresh: Start with new interpreters also where a `fork_server` is open.

    Raises:
        TimeoutError: The job was not over in time; shows what it had said.
    """
    home = Path(home or tempfile.mkdtemp(prefix="trainonce-test-"))
    records = home / "records"
    records.mkdir(parents=True, exist_ok=True)
    job = job or f"test-{os.getpid()}-{time.monotonic_ns()}"
    command = _command(launcher, nproc_per_node, spares, chaos, job, options)
    command += [str(script), *map(str, args)]
    environment = {**os.environ, **_ENVIRONMENT, **(env or {})}
    environment[settings.HOME.name] = str(home)
    environment[settings.TEST_RECORDS.name] = str(records)
    # Files, not pipes: a process that is left behind would keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if launcher == "trainonce" and _servers and not fresh:
            arguments = command[1 + len(_OURS) :]
            process = _servers[-1].launch(arguments, environment, out.fileno(), err.fileno())
        else:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True)
        try:
            if watch is not None:
                watch(process)
            process.wait(timeout_s)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        leftovers = _leftovers(home, 0.0 if late else _LEAVE_S)
        process.kill()
        exit_code = process.wait()
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if late:
        raise TimeoutError(
            f"{' '.join(command)} was not over after {timeout_s} s\n{stdout}\n{stderr}"
        )
    return JobResult(
        command=command,
        exit_code=exit_code,
        stdout=stdout,
        stderr=stderr,
        home=home,
        job=job,
        events=_events(home, job) if launcher == "trainonce" else [],
        records=read_records(records),
        leftovers=leftovers,
    )


_OURS = ("-m", "trainonce.cli.main")
# One thread a rank, so that several ranks do not fight over the cores of a small machine.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "PYTHONPATH": str(Path(trainonce.__file__).parents[1]),
}


def _command(
    launcher: Launcher, nproc: int, spares: int, chaos: str, job: str, options: tuple[str, ...]
) -> list[str]:
    if launcher == "python":
        return [sys.executable, *options]
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc-per-node={nproc}", *options]
    command = [sys.executable, *_OURS, "run", "--job-id", job]
    command += [f"--nproc-per-node={nproc}", f"--spares={spares}"]
    return [*command, *(["--chaos", chaos] if chaos else []), *options]


def _events(home: Path, job: str) -> list[Event]:
    with Ledger.open(home, on_error=lambda text: None) as ledger:
        return list(ledger.events(job))


def _of_home(home: Path) -> list[psutil.Process]:
    """Return the living processes of the job in `home`, whoever their parent is."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            forked = process.name() == name_of(str(home))
            if forked or process.environ().get(settings.HOME.name) == str(home):
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def _leftovers(home: Path, patience_s: float) -> list[str]:
    """Wait until every process of the job has left; kill and describe those that stay."""
    begun_s = time.monotonic()
    pause = threading.Event()
    while (alive := _of_home(home)) and time.monotonic() - begun_s < patience_s:
        pause.wait(_POLL_S)
    described: list[str] = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            described.append(f"{process.pid}: {' '.join(process.cmdline())}")
            process.kill()
    return described


def _has(event: Event, wanted: Mapping[str, Any]) -> bool:
    return all(getattr(event, name) == value for name, value in wanted.items())


def _differences(
    mine: Mapping[Any, Any], theirs: Mapping[Any, Any], path: str = "rank "
) -> list[str]:
    found: list[str] = []
    for key in sorted({*mine, *theirs}, key=repr):
        one, two = mine.get(key), theirs.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += _differences(one, two, f"{path}{key} ")
        elif one != two:
            found.append(f"{path}{key}: {one} and {two}")
    return found
