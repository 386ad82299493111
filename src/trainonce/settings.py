"""Every TRAINONCE_* environment variable, and where the package keeps its files.

Each component owns one frozen dataclass for its own settings; this module holds what more
than one of them reads.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainonce.errors import ConfigError


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
PROFILE_S = EnvVar("TRAINONCE_PROFILE_S", "seconds of each epoch that rank 0 profiles (0)")
PRELOAD = EnvVar("TRAINONCE_PRELOAD", "0: start spares afresh, not by a fork (1)")
EXACT_RETURNS_MB = EnvVar(
    "TRAINONCE_EXACT_RETURNS_MB", "state that is copied for what steps return after updates (100)"
)
VARIABLES = EnvVar("TRAINONCE_VARIABLES", "0: variables of the script are not carried over (1)")

# Set by the launcher for its workers; users do not set these.
REDUNDANCY = EnvVar(
    "TRAINONCE_REQUIRE_REDUNDANCY", "set by the launcher: further copies that all state must have"
)
JOB = EnvVar("TRAINONCE_JOB", "set by the launcher: id of the job")
WORKER = EnvVar("TRAINONCE_WORKER", "set by the launcher: id of this worker within the job")
CONTROL_FD = EnvVar("TRAINONCE_CONTROL_FD", "set by the launcher: socket to the controller")
PROGRESS_FD = EnvVar("TRAINONCE_PROGRESS_FD", "set by the launcher: shared progress page")
SPARE = EnvVar("TRAINONCE_SPARE", "set by the launcher: 1 in a worker that holds no rank yet")
SLOT = EnvVar("TRAINONCE_SLOT", "set by the launcher: number of the device to use, if any")

TEST_RECORDS = EnvVar("TRAINONCE_TEST_RECORDS", "set by trainonce.testing: folder for records")

ALL = (
    HOME, STORE, PROJECT, PRECISION, PRELOAD, EXACT_RETURNS_MB, VARIABLES, REDUNDANCY, PROFILE_S,
    JOB, WORKER, CONTROL_FD, PROGRESS_FD, SPARE, SLOT, TEST_RECORDS,
)  # fmt: skip


def home() -> Path:
    """Return the folder of ledger, checkpoints and logs. It may not exist yet."""
    return Path(HOME.get() or Path.home() / ".trainonce").expanduser()


def read_file(folder: Path) -> dict[str, Any]:
    """Return what `folder`/settings.toml holds; nothing where there is none.

    Raises:
        ConfigError: It cannot be read, or is no TOML.
    """
    path = folder / "settings.toml"
    try:
        return tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def table(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the table `name` in `values`; an empty one where there is none.

    Raises:
        ConfigError: It is no table.
    """
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name!r} in settings.toml is {found!r}", hint=f"write [{name}]")
    return found


def make(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """Return the settings `cls` made of the table `where`.

    Raises:
        ConfigError: A name is unknown, or a value cannot be used.
    """
    allowed = [one.name for one in dataclasses.fields(cls)]
    for name in values:
        if name not in allowed:
            raise ConfigError(
                f"unknown setting {name!r} in [{where}]", hint="one of " + ", ".join(allowed)
            )
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"[{where}] in settings.toml: {error}") from error
