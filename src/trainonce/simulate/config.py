"""Scenario and policies from a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.simulate.failures import RATES, FailureRates
from trainonce.simulate.policies import POLICIES, Policy
from trainonce.simulate.scenario import Scenario

if TYPE_CHECKING:
    from pathlib import Path

_TEXT = {"name", "summary", "spare_source", "rates"}
_WHOLE = {"num_gpus", "gpus_per_node", "spares", "replica_groups"}
_FLAGS = {"predicts"}


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Policy]]:
    """Read a file with a `[scenario]` table and `[policies.NAME]` tables, each optional.

    A policy's table changes the built-in policy of that name, or the one named by its `base`.

    Returns:
        Fields of `Scenario`, and all policies by name, the built-in ones included.

    Raises:
        ConfigError: The file cannot be read, or a setting in it is unknown or has another type.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    _reject_unknown(tables, {"scenario", "policies"}, f"{path}")
    scenario = _table(tables.get("scenario", {}), "[scenario]")
    _check_fields(scenario, Scenario, "[scenario]", skip={"causes"})
    if "rates" in scenario:
        scenario["rates"] = parse_rates(scenario["rates"])
    policies = dict(POLICIES)
    for name, raw in _table(tables.get("policies", {}), "[policies]").items():
        table = _table(raw, f"[policies.{name}]")
        if name not in policies and "base" not in table:
            raise ConfigError(
                f"[policies.{name}] is a new policy and has no base",
                hint=f'base = "restart-tuned", or another of {", ".join(policies)}',
            )
        base = find_policy(table.pop("base", name), policies)
        _check_fields(table, Policy, f"[policies.{name}]", skip={"name"})
        policies[name] = dataclasses.replace(base, name=name, **table)
    return scenario, policies


def parse_rates(value: str | float) -> FailureRates:
    """Return the failure rates named by `value`, or a flat rate where it is a number."""
    if isinstance(value, str) and value in RATES:
        return RATES[value]
    try:
        rate = float(value)
    except ValueError as error:
        raise ConfigError(
            f"unknown failure rates {value!r}",
            hint=f"one of {', '.join(RATES)}, or failures per node-day such as 0.0065",
        ) from error
    return FailureRates(name=f"{rate:g}", source="given", points=((1, rate),))


def find_policy(name: object, policies: dict[str, Policy]) -> Policy:
    """Return the policy of that name.

    Raises:
        ConfigError: There is none.
    """
    if not isinstance(name, str) or name not in policies:
        raise ConfigError(f"unknown policy {name!r}", hint=f"one of {', '.join(policies)}")
    return policies[name]


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table, not {value!r}")
    return dict(value)


def _reject_unknown(table: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown setting {unknown[0]!r}", hint=f"one of {', '.join(sorted(known))}"
        )


def _check_fields(
    table: dict[str, Any], cls: type[Scenario | Policy], where: str, skip: set[str]
) -> None:
    """Raise unless every value names a field of `cls` and has its type."""
    _reject_unknown(table, {f.name for f in dataclasses.fields(cls)} - skip, where)
    for name, value in table.items():
        if name == "rates":
            fits = isinstance(value, str | float | int) and not isinstance(value, bool)
        elif name in _TEXT:
            fits = isinstance(value, str)
        elif name in _FLAGS:
            fits = isinstance(value, bool)
        elif name in _WHOLE:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits:
            raise ConfigError(f"{where}: {name} cannot be {value!r}")
