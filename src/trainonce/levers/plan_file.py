"""A plan: what is switched on for a run, and why; kept as a TOML file that people can read."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.levers import registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainonce.levers.fingerprint import Fingerprint

FORMAT = 1
_HEAD = """\
# A plan of trainonce: how to train one model on one dataset with less compute.
#
# `trainonce.fit(..., plan="{name}")` follows it. Everything below may be edited: switch a
# lever with `on`, or change its settings. `why` says what decided it, `expected` what it is
# expected to save, and from which measurement that is known.
"""
_SECTIONS = {
    "fingerprint": "What the plan was made for. `fit` refuses it for another model.",
    "run": "Length and batch of the run.",
    "probes": "What was tried before, what that cost, and what the guard compares with.",
}


@dataclass(frozen=True, kw_only=True)
class LeverPlan:
    """One lever of a plan.

    Args:
        on: Whether it is used.
        why: What decided that, in one sentence.
        expected: What it is expected to save, and where that is known from.
        reversible: The guard may switch it off in mid-run.
        settings: Its arguments, as plain values.
    """

    on: bool
    why: str
    expected: str
    reversible: bool
    settings: dict[str, Any] = field(default_factory=lambda: {})


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How long, and in which batches.

    Args:
        steps: Updates of the whole run.
        batch_size: Samples of an update, all ranks together.
        micro_batch: Samples that a rank takes at once.
        lr: Peak rate; 0 where the optimizer is the caller's own.
        why: Where these come from.

    Raises:
        ConfigError: A number out of range.
    """

    steps: int
    batch_size: int
    micro_batch: int
    lr: float
    why: str

    def __post_init__(self) -> None:
        least = min(self.steps, self.batch_size, self.micro_batch)
        if least < 1 or not 0 <= self.lr < math.inf:
            raise ConfigError(
                f"no run has steps={self.steps}, batch_size={self.batch_size}, "
                f"micro_batch={self.micro_batch} and lr={self.lr:g}",
                hint="numbers of at least 1, and a rate that is not negative",
            )


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """What the probes showed.

    Args:
        steps: Updates that all probes together made: what the plan cost.
        share: That as a share of the run.
        guard_step: After so many updates the guard compares; 0: nothing to compare with.
        off_arm: Held-out losses after `guard_step` updates with every reversible lever off, one
            a seed.
        tried_lr: Rate to held-out loss of the rate probe, as text to number.
        notes: What was found beside, and what was left out.
    """

    steps: int = 0
    share: float = 0.0
    guard_step: int = 0
    off_arm: list[float] = field(default_factory=lambda: [])
    tried_lr: dict[str, float] = field(default_factory=lambda: {})
    notes: list[str] = field(default_factory=lambda: [])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `trainonce.plan` decided; see `docs/plan.md`.

    Args:
        fingerprint: What it was made for.
        run: Length and batch.
        levers: By name, in the registry's order.
        probes: What was tried.
    """

    fingerprint: Fingerprint
    run: RunPlan
    levers: dict[str, LeverPlan]
    probes: ProbeRecord = field(default_factory=ProbeRecord)

    def is_on(self, lever: str) -> bool:
        """Tell whether a lever is on."""
        return lever in self.levers and self.levers[lever].on

    def settings(self, lever: str) -> dict[str, Any]:
        """Return a lever's settings."""
        return dict(self.levers[lever].settings) if lever in self.levers else {}

    def override(self, lever: str, *, on: bool | None = None, **settings: Any) -> Plan:
        """Return the plan with one lever switched or set differently.

        Raises:
            ConfigError: The plan has no such lever.
        """
        if lever not in self.levers:
            raise ConfigError(
                f"the plan has no lever {lever!r}", hint="one of " + ", ".join(self.levers)
            )
        old = self.levers[lever]
        new = dataclasses.replace(
            old,
            on=old.on if on is None else on,
            why=f"overridden; it was {'on' if old.on else 'off'}: {old.why}",
            settings={**old.settings, **settings},
        )
        return dataclasses.replace(self, levers={**self.levers, lever: new})

    def to_toml(self, name: str = "plan.toml") -> str:
        """Return the plan as commented TOML."""
        parts = [_HEAD.format(name=name), f"format = {FORMAT}\n"]
        for section in ("fingerprint", "run", "probes"):
            values = dataclasses.asdict(getattr(self, section))
            parts.append(f"# {_SECTIONS[section]}\n[{section}]\n{_lines(values)}")
        for lever, choice in self.levers.items():
            values = dataclasses.asdict(choice)
            settings = values.pop("settings")
            parts.append(f"[levers.{lever}]\n{_lines(values)}{_lines(settings)}")
        return "\n".join(parts)

    def write(self, path: str | Path) -> Path:
        """Write the plan to `path`, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        partial.write_text(self.to_toml(target.name))
        partial.replace(target)
        return target


def read_plan(path: str | Path) -> Plan:
    """Return the plan in a file.

    Raises:
        ConfigError: It cannot be read, or is no plan; names what is wrong.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the plan {path} cannot be read: {error}", hint="name a TOML file, or a new one"
        ) from error
    return parse_plan(text, str(path))


def parse_plan(text: str, name: str = "plan") -> Plan:
    """Return the plan in TOML text; `name` is for messages. Raises as `read_plan`."""
    from trainonce.levers.fingerprint import Fingerprint

    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is no TOML: {error}", hint="mend it, or make it anew") from error
    if table.get("format") != FORMAT:
        raise ConfigError(f"{name} is no plan of format {FORMAT}", hint="make it anew")
    levers = table.get("levers", {})
    return Plan(
        fingerprint=_make(Fingerprint, table.get("fingerprint"), f"{name}, [fingerprint]"),
        run=_make(RunPlan, table.get("run"), f"{name}, [run]"),
        probes=_make(ProbeRecord, table.get("probes", {}), f"{name}, [probes]"),
        levers={lever: _lever(lever, values, f"{name}, [levers.{lever}]") for lever, values in
                levers.items()},
    )  # fmt: skip


def _lever(lever: str, values: Any, where: str) -> LeverPlan:
    if lever not in registry.LEVERS:
        raise ConfigError(
            f"{where}: there is no such lever", hint="one of " + ", ".join(registry.LEVERS)
        )
    known = {each.name for each in dataclasses.fields(LeverPlan)} - {"settings"}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}", hint="a table with on, why and settings")
    own = {key: value for key, value in values.items() if key in known}
    rest = {key: value for key, value in values.items() if key not in known}
    return _make(LeverPlan, {**own, "settings": rest}, where)


def _make(cls: type[Any], values: Any, where: str) -> Any:
    fields = {each.name: each for each in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is missing", hint="make the plan anew")
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"{where} has unknown {unknown}", hint="one of " + ", ".join(fields))
    for key, value in values.items():
        if not _fits(value, str(fields[key].type)):
            raise ConfigError(f"{where}: {key} is {value!r}", hint=f"of type {fields[key].type}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}", hint="make the plan anew") from error


def _fits(value: Any, wanted: str) -> bool:
    """Tell whether a value is what a field's annotation says."""
    kind, _, inner = wanted.removesuffix("]").partition("[")
    if kind == "list":
        return isinstance(value, list) and all(_fits(each, inner) for each in value)  # pyright: ignore[reportUnknownVariableType]
    if kind == "dict":
        each_of = inner.partition(", ")[2]
        return isinstance(value, dict) and all(_fits(each, each_of) for each in value.values())  # pyright: ignore[reportUnknownVariableType]
    types = _TYPES.get(kind)
    return types is None or (
        isinstance(value, types) and (not isinstance(value, bool) or types == (bool,))
    )


_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
}


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in values.items())


def _value(value: Any) -> str:
    """Return a plain value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML's words too
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        items: list[str] = [_value(each) for each in value]
        return "[" + ", ".join(items) + "]"
    if isinstance(value, dict):
        pairs: list[str] = [f"{json.dumps(str(k))} = {_value(v)}" for k, v in value.items()]
        return "{" + ", ".join(pairs) + "}"
    raise ConfigError(f"{value!r} has no form in a plan file")
