"""The command line of `trainonce run`: torchrun's spelling and meaning, and a few options more."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
from pathlib import Path
from typing import Any, cast

from trainonce import settings
from trainonce.controller.options import RunOptions
from trainonce.controller.policy import HangLimits, WhenNoSpare
from trainonce.errors import ConfigError
from trainonce.fleet.feed import HealthSettings
from trainonce.fleet.sources.words import HINT
from trainonce.ledger import prices
from trainonce.ledger.energy import open_meter
from trainonce.ledger.prices import BudgetSettings, EconomicsSettings
from trainonce.wire.faults import ACTIONS, POINTS, parse_plan

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "")


class _FromEnvironment(argparse.Action):
    """torchrun reads the default of each option from PET_<OPTION>; so do we."""

    def __init__(self, dest: str, default: Any = None, **kwargs: Any) -> None:
        super().__init__(
            dest=dest, default=os.environ.get(f"PET_{dest.upper()}", default), **kwargs
        )

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        setattr(namespace, self.dest, values)


class _FlagFromEnvironment(argparse.Action):
    """The same for an option without a value: PET_<OPTION>=1."""

    def __init__(self, dest: str, **kwargs: Any) -> None:
        kwargs.pop("default", None)
        default = os.environ.get(f"PET_{dest.upper()}", "0") not in ("0", "")
        super().__init__(dest=dest, nargs=0, default=default, **kwargs)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        setattr(namespace, self.dest, True)


# Option after "--max-": metric of the budget, and its unit.
_BUDGETS = {
    "cost-usd": ("cost_usd", "USD"),
    "kwh": ("energy_kwh", "kWh"),
    "hours": ("hours", "hours by the clock"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of `trainonce run` to `parser`."""
    parser.epilog = (
        f"Faults of --chaos: {', '.join(ACTIONS)}. Points of a step and of a recovery:"
        f" {', '.join(POINTS)}. docs/launcher.md and docs/testing.md say what each does."
    )

    def option(*names: str, **kwargs: Any) -> None:
        dashed = [name for name in names if name.startswith("--") and "-" in name[2:]]
        spellings = [*names, *(f"--{name[2:].replace('-', '_')}" for name in dashed)]
        kwargs.setdefault("action", _FromEnvironment)
        parser.add_argument(*spellings, **kwargs)

    def flag(*names: str, **kwargs: Any) -> None:
        option(*names, action=_FlagFromEnvironment, **kwargs)

    option("--nproc-per-node", default="1", help="ranks: a number, cpu, gpu, xpu or auto (1)")
    option("--spares", type=int, default=0, help="hot spares to keep (0: start one when needed)")
    option("--when-no-spare", choices=[each.value for each in WhenNoSpare], default="spread",
           help="a device is lost: wait, spread its ranks (default), or checkpoint")  # fmt: skip
    option("--chaos", default="", metavar="PLAN",
           help='inject faults: "kill rank=1 step=50 point=backward; …" (see below)')  # fmt: skip
    option("--hang-timeout-s", type=float, default=None, help="no progress for this long: a hang")
    option("--grace-s", type=float, default=None, help="time to end cleanly after SIGTERM (30)")
    option("--health", default=None, metavar="SOURCES", help=f"health signals to act on: {HINT}")
    option("--health-every-s", type=float, default=None, help="time between two readings (10)")
    for name, (_metric, unit) in _BUDGETS.items():
        option(
            f"--max-{name}",
            type=float,
            metavar="X",
            default=None,
            help=f"{unit}: alerts at 50, 80, 100 %% of it, then a clean, resumable stop",
        )
    option("--profile-s", type=float, default=0.0, help="profile so long of each epoch (0: never)")
    option("--budget-webhook", default="", metavar="URL", help="gets these alerts as JSON")
    option("--job-id", default="", help="id of the job; made up by default")
    option("--resume", default="", metavar="JOB", help="start from the checkpoint of this job")
    option("--require-redundancy", type=int, default=0, metavar="N",
           help="refuse to train state with fewer further copies (0)")  # fmt: skip
    option("--max-restarts", type=int, default=None, help="restarts of all ranks (see the docs)")
    flag("-m", "--module", help="the script is a module, as with python -m")
    flag("--no-python", help="run the script directly, without python")
    flag("--run-path", help="as torchrun; the script runs in a process of its own here")
    option("--log-dir", default=None, help="folder of redirected and tee'd output")
    option("-r", "--redirects", default="0", help="output to files: 0-3, or 0:1,1:2 by rank")
    option("-t", "--tee", default="0", help="output to files and to the terminal; as redirects")
    option("--local-ranks-filter", default="", help="only show the output of these ranks")
    option("--role", default="default", help="name of the ranks, in prefixes and ROLE_NAME")
    option("--signals-to-handle", default="SIGTERM,SIGINT,SIGHUP,SIGQUIT",
           help="signals that end the job cleanly")  # fmt: skip
    option("--shutdown-timeout", type=int, default=None, help="torchrun's word for --grace-s")
    flag("--virtual-local-rank", help="each rank sees its own GPU as device 0")
    flag("--standalone", help="accepted: a job of one node is always standalone")
    option("--nnodes", default="1:1", help="1 or 1:1: this launcher runs on one node")
    option("--node-rank", type=int, default=0, help="0")
    option("--master-addr", default="127.0.0.1", help="accepted: the store is on loopback")
    option("--master-port", type=int, default=None, help="port of the store (a free one)")
    option("--local-addr", default=None, help="accepted: one node needs none")
    option("--rdzv-backend", default="static", help="accepted: one node needs no rendezvous")
    option("--rdzv-endpoint", default="", help="only its port is used")
    option("--rdzv-id", default="none", help="becomes TORCHELASTIC_RUN_ID")
    option("--rdzv-conf", default="", help="accepted: one node needs no rendezvous")
    option("--monitor-interval", type=float, default=0.1, help="accepted: exits are seen at once")
    option("--start-method", default="spawn", choices=["spawn", "fork", "forkserver"],
           help="accepted: workers are always processes of their own")  # fmt: skip
    option("--event-log-handler", default="null", help="accepted: events go to the ledger")
    option("--duplicate-stdout-filters", default="", help="accepted, without effect")
    option("--duplicate-stderr-filters", default="", help="accepted, without effect")
    parser.add_argument("--logs-specs", "--logs_specs", default=None,
                        help="accepted, without effect")  # fmt: skip
    parser.add_argument("--numa-binding", "--numa_binding", default=None,
                        choices=["node", "socket", "exclusive", "core-complex"],
                        help="accepted, without effect")  # fmt: skip
    parser.add_argument("training_script", help="script, module or program")
    rest = parser.add_argument(
        "training_script_args", nargs=argparse.REMAINDER, help="its arguments"
    )
    rest.required = False  # before Python 3.12 argparse would name it among what is missing


def from_args(args: argparse.Namespace) -> RunOptions:
    """Return the options in `args`.

    Raises:
        ConfigError: One of them cannot be used.
    """
    if args.nnodes not in ("1", "1:1") or args.node_rank != 0:
        raise ConfigError(
            f"--nnodes {args.nnodes} --node-rank {args.node_rank}: this launcher runs on one node",
            hint="give --nnodes 1, or leave it out",
        )
    if args.module and args.no_python:
        raise ConfigError("-m and --no-python exclude each other", hint="leave one of them out")
    nproc = num_ranks(args.nproc_per_node)
    hang = HangLimits()
    if args.hang_timeout_s is not None:
        hang = HangLimits(floor_s=args.hang_timeout_s, outside_floor_s=args.hang_timeout_s)
    grace_s = args.grace_s if args.grace_s is not None else args.shutdown_timeout
    return RunOptions(
        script=args.training_script,
        script_args=tuple(args.training_script_args),
        nproc=nproc,
        spares=args.spares,
        when_no_spare=_when_no_spare(args.when_no_spare),
        module=args.module,
        no_python=args.no_python,
        max_restarts=args.max_restarts,
        job=args.job_id,
        resume=args.resume,
        redundancy=args.require_redundancy,
        chaos=tuple(parse_plan(args.chaos)),
        hang=hang,
        grace_s=30.0 if grace_s is None else float(grace_s),
        log_dir=Path(args.log_dir) if args.log_dir else None,
        redirects=stream_modes("--redirects", args.redirects, max(nproc, 1)),
        tee=stream_modes("--tee", args.tee, max(nproc, 1)),
        shown_ranks=_ranks(args.local_ranks_filter),
        role=args.role,
        run_id="" if args.rdzv_id == "none" or args.standalone else args.rdzv_id,
        master_port=_port(args),
        virtual_local_rank=args.virtual_local_rank,
        signals=_signals(args.signals_to_handle),
        notices=tuple(_notices(args)),
        health=_health(args),
        economics=_economics(args),
        profile_s=args.profile_s,
    )


def _when_no_spare(text: str) -> WhenNoSpare:
    try:
        return WhenNoSpare(text)
    except ValueError:  # from PET_WHEN_NO_SPARE, which argparse does not check
        known = ", ".join(each.value for each in WhenNoSpare)
        raise ConfigError(f"--when-no-spare is {text!r}", hint=f"one of {known}") from None


def _health(args: argparse.Namespace) -> HealthSettings:
    """Return the settings in [health] of settings.toml, with the options over them."""
    values = dict(settings.table(settings.read_file(settings.home()), "health"))
    if "sources" in values:
        if not isinstance(values["sources"], list):
            raise ConfigError(f"sources in [health] is {values['sources']!r}", hint='["auto"]')
        values["sources"] = tuple(map(str, values["sources"]))
    if args.health is not None:
        values["sources"] = tuple(word.strip() for word in args.health.split(","))
    if args.health_every_s is not None:
        values["every_s"] = args.health_every_s
    return settings.make(HealthSettings, values, "health")


def _economics(args: argparse.Namespace) -> EconomicsSettings:
    """Return prices and budgets of settings.toml, and the budgets that the options add."""
    economics = prices.load(settings.home())
    asked = [
        BudgetSettings(
            name=f"--max-{name}", metric=metric, limit=limit, webhook=args.budget_webhook, stop=True
        )
        for name, (metric, _unit) in _BUDGETS.items()
        if (limit := getattr(args, f"max_{name.replace('-', '_')}")) is not None
    ]
    economics = dataclasses.replace(economics, budgets=(*economics.budgets, *asked))
    project = economics.prices_of(settings.PROJECT.get() or "default")
    if args.max_cost_usd is not None and project.usd_per_gpu_hour is None:
        raise ConfigError(
            "--max-cost-usd, and no price is set",
            hint=f"write usd_per_gpu_hour under [economics] in {settings.home()}/settings.toml",
        )
    if args.max_kwh is not None and project.gpu_tdp_w is None and open_meter() is None:
        raise ConfigError(
            "--max-kwh, and nothing measures energy here",
            hint=f"write gpu_tdp_w under [economics] in {settings.home()}/settings.toml",
        )
    return economics


def num_ranks(nproc_per_node: str) -> int:
    """Return how many ranks torchrun's `--nproc-per-node` stands for on this host.

    Raises:
        ConfigError: It is neither a number nor a kind of device that is present.
    """
    try:
        return int(nproc_per_node)
    except ValueError:
        pass
    if nproc_per_node == "cpu":
        return os.cpu_count() or 1
    if nproc_per_node not in ("gpu", "xpu", "auto"):
        raise ConfigError(
            f"--nproc-per-node is {nproc_per_node!r}", hint="give a number, cpu, gpu, xpu or auto"
        )
    import torch  # only here: the launcher starts in a breath without it

    if nproc_per_node == "auto" and not torch.accelerator.is_available():
        return os.cpu_count() or 1
    devices = {"gpu": torch.cuda, "xpu": torch.xpu, "auto": torch.accelerator}[nproc_per_node]
    if not devices.is_available():
        raise ConfigError(
            f"--nproc-per-node {nproc_per_node}, and this machine has none",
            hint="give a number of ranks, or cpu",
        )
    return devices.device_count()


def stream_modes(name: str, text: str, nproc: int) -> tuple[int, ...]:
    """Return the modes by rank in torchrun's `--redirects` and `--tee`.

    Raises:
        ConfigError: `text` is neither a mode (0 to 3) nor a list like 0:1,1:2.
    """
    if re.fullmatch(r"[0-3]", text):
        return (int(text),) * nproc
    if re.fullmatch(r"(\d+:[0-3],)*(\d+:[0-3])", text):
        modes = dict(cast("list[tuple[int, int]]", [tuple(map(int, pair.split(":")))
                     for pair in text.split(",")]))  # fmt: skip
        return tuple(modes.get(rank, 0) for rank in range(nproc))
    raise ConfigError(
        f"{name} {text!r} is not understood", hint="give 0, 1 (stdout), 2 (stderr), 3, or 0:1,1:2"
    )


def _ranks(text: str) -> frozenset[int]:
    try:
        return frozenset(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--local-ranks-filter {text!r}", hint="give ranks like 0,1") from None


def _signals(text: str) -> tuple[int, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    try:
        return tuple(signal.Signals[name] for name in names)
    except KeyError as error:
        raise ConfigError(f"--signals-to-handle names no signal {error}") from None


def _port(args: argparse.Namespace) -> int:
    if args.master_port is not None:
        return int(args.master_port)
    _host, _colon, port = args.rdzv_endpoint.rpartition(":")
    return int(port) if port.isdigit() and not args.standalone else 0


def _notices(args: argparse.Namespace) -> list[str]:
    found: list[str] = []
    if args.rdzv_backend != "static" or args.rdzv_conf or args.rdzv_endpoint:
        found.append("--rdzv-* has no further effect: a job of one node needs no rendezvous")
    if args.master_addr not in _LOOPBACK:
        found.append(f"--master-addr {args.master_addr} is not used: the store is on loopback")
    without = {
        "--logs-specs": args.logs_specs,
        "--numa-binding": args.numa_binding,
        "--duplicate-stdout-filters": args.duplicate_stdout_filters,
        "--duplicate-stderr-filters": args.duplicate_stderr_filters,
    }
    found += [f"{name} has no effect here" for name, value in without.items() if value]
    return found
