"""What one job is to run, and how. `arguments` makes it of a command line."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainonce.controller.policy import HangLimits, WhenNoSpare
from trainonce.errors import ConfigError
from trainonce.fleet.feed import HealthSettings
from trainonce.ledger.prices import EconomicsSettings
from trainonce.wire.faults import refuse_impossible

if TYPE_CHECKING:
    from trainonce.wire.faults import Fault

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")
OUT, ERR = 1, 2


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What one job is to run, and how. Validated on construction.

    Args:
        script: Script, module or program.
        script_args: Its arguments; `${local_rank}` in them is replaced, as by torchrun.
        nproc: Ranks, at least 1.
        spares: Hot spares to keep. With 0 a replacement is started when it is needed.
        when_no_spare: What becomes of a lost rank whose device is lost, too.
        module: `script` is a module name.
        no_python: `script` is a program.
        max_restarts: Restarts of all ranks; None for the default (0 for a script that does
            not use trainonce, 3 for one that does).
        job: Id of the job; empty to make one up.
        resume: Id of an earlier job, or folder of a checkpoint, to start from.
        redundancy: Refuse to train unless all state has so many copies beside the one in use.
        chaos: The fault plan.
        hang: Limits of the hang detection.
        grace_s: After SIGTERM or Ctrl-C, time to finish the step and write a checkpoint.
        log_dir: Where `redirects` and `tee` put their files; None for the job's folder.
        redirects: 0 to 3 by rank: 1 sends stdout to a file, 2 stderr.
        tee: The same, and shows it with a prefix.
        shown_ranks: Ranks whose output reaches the terminal; empty for all.
        role: torchrun's name for the ranks.
        run_id: TORCHELASTIC_RUN_ID; empty for the id of the job.
        master_port: Port of the store; 0 for a free one.
        virtual_local_rank: Each rank sees its own GPU as device 0.
        signals: Signals that end the job cleanly.
        notices: What to tell the user about these options, at the start.
        health: Which health signals are read, and what may follow.
        economics: Prices and budgets.
        profile_s: Seconds of each epoch that rank 0 profiles; 0 for none.
    """

    script: str
    script_args: tuple[str, ...] = ()
    nproc: int = 1
    spares: int = 0
    when_no_spare: WhenNoSpare = WhenNoSpare.SPREAD
    module: bool = False
    no_python: bool = False
    max_restarts: int | None = None
    job: str = ""
    resume: str = ""
    redundancy: int = 0
    chaos: tuple[Fault, ...] = ()
    hang: HangLimits = field(default_factory=HangLimits)
    grace_s: float = 30.0
    log_dir: Path | None = None
    redirects: tuple[int, ...] = ()
    tee: tuple[int, ...] = ()
    shown_ranks: frozenset[int] = frozenset()
    role: str = "default"
    run_id: str = ""
    master_port: int = 0
    virtual_local_rank: bool = False
    signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    notices: tuple[str, ...] = ()
    health: HealthSettings = field(default_factory=HealthSettings)
    economics: EconomicsSettings = field(default_factory=EconomicsSettings)
    profile_s: float = 0.0

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise ConfigError(
                f"--nproc-per-node is {self.nproc}: there is nothing to run",
                hint="give at least one rank, or cpu, gpu, auto",
            )
        if self.spares < 0:
            raise ConfigError(f"--spares is {self.spares}", hint="give 0 or more")
        if self.redundancy < 0:
            raise ConfigError(
                f"--require-redundancy is {self.redundancy}", hint="give 0 or more further copies"
            )
        if self.max_restarts is not None and self.max_restarts < 0:
            raise ConfigError(f"--max-restarts is {self.max_restarts}", hint="give 0 or more")
        if not 0 <= self.profile_s <= 600:
            raise ConfigError(f"--profile-s is {self.profile_s}", hint="give 0 to 600 seconds")
        if not self.grace_s >= 0:  # nor is it a number
            raise ConfigError(f"--grace-s is {self.grace_s}", hint="give 0 or more seconds")
        if not 0 <= self.master_port <= 65535:
            raise ConfigError(f"--master-port is {self.master_port}", hint="give 0 to 65535")
        if self.job and not _NAME.match(self.job):
            raise ConfigError(
                f"--job-id {self.job!r} cannot name a folder",
                hint="use letters, digits, dots, dashes and underscores",
            )
        if not (self.module or self.no_python) and not Path(self.script).is_file():
            raise ConfigError(
                f"there is no script {self.script!r} in {os.getcwd()}",
                hint="options go before the script, its own arguments after it",
            )
        refuse_impossible(self.chaos, num_ranks=self.nproc, spares=self.spares)

    def stream_mode(self, modes: tuple[int, ...], rank: int) -> int:
        """Return `redirects` or `tee` of `rank`; of a spare (rank -1) what any rank has."""
        if not modes:
            return 0
        return max(modes) if rank < 0 else modes[rank]
