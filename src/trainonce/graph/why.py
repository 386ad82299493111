"""Why a node hit or missed: its key against the nearest one in the store, field by field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce.graph.executor import Resources, plan_of

if TYPE_CHECKING:
    from trainonce.graph.evaluate import Task
    from trainonce.graph.index import Entry
    from trainonce.graph.keys import ActionKey
    from trainonce.graph.node import Node
    from trainonce.graph.store import Store


@dataclass(frozen=True)
class Change:
    """One field in which two keys differ.

    Args:
        field: As in "code helpers.clean" or "argument lr".
        what: "changed", "new" or "gone".
        before: How the stored key shows it.
        now: How the other one shows it; a place (`text.py:14`) for code.
    """

    field: str
    what: str
    before: str = ""
    now: str = ""

    def __str__(self) -> str:
        if self.field.startswith(("code ", "value ", "module ")):
            return f"{self.field} {self.what}" + (f": {self.now}" if self.now else "")
        arrow = f": {self.before} → {self.now}" if self.before or self.now else ""
        return f"{self.field} {self.what}{arrow}"


@dataclass(frozen=True)
class Why:
    """The reason for a hit or a miss.

    Args:
        node: Its name.
        status: "hit", "miss", "uncached", or "unknown" where its inputs would run first.
        key: The action key, where there is one.
        nearest: Key of the stored result that differs least; empty where none is stored.
        changes: What differs from it.
        reasons: Why it is not cached, and what else is worth knowing.
    """

    node: str
    status: str
    key: str = ""
    nearest: str = ""
    changes: tuple[Change, ...] = ()
    reasons: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.status}: {self.node} {self.key[:16]}".rstrip()]
        if self.nearest:
            lines.append(f"  against {self.nearest[:16]}, the nearest stored result:")
        lines += [f"  {change}" for change in self.changes]
        lines += [f"  {reason}" for reason in self.reasons]
        return "\n".join(lines)


def why(node: Node[Any], *, store: Store) -> Why:
    """Explain what `compute` would do with a node, without running anything."""
    task, plan = plan_of(node, store, Resources.of(None))
    if not all(dep.settled for dep in task.deps):
        waits = tuple(f"{dep.node.name} would run first" for dep in task.deps if not dep.settled)
        return Why(node.name, "unknown", reasons=waits)
    if task.recorded is not None:
        return _why_expanded(task, [s.node for s in plan.steps if s.action != "hit"])
    if task.entry is not None:
        return Why(node.name, "hit", task.key.key, reasons=_remarks(task.entry, store))
    if task.key.reasons:
        return Why(node.name, "uncached", task.key.key, reasons=tuple(task.key.reasons))
    return _miss(node.name, task.key, store)


def _why_expanded(task: Task, missing: list[str]) -> Why:
    remark = "its function is not called: the nodes that it returned are known"
    waits = tuple(f"{name}, which it needs, would run" for name in missing)
    status = "unknown" if waits else "hit"
    return Why(task.node.name, status, task.key.key, reasons=(remark, *waits))


def compare(entry: Entry, other: Entry) -> tuple[Change, ...]:
    """Return the fields in which two stored keys differ; `entry` is the newer one."""
    return _changes(other.parts, other.shown, entry.parts, entry.shown)


def _miss(name: str, made: ActionKey, store: Store) -> Why:
    entries = store.index.entries(name)
    noted = store.reason_uncached(name)
    reasons = [f"the last run was not cached: {noted}"] if noted else []
    reasons += made.notes
    if any(entry.parts == made.parts for entry in entries):
        reasons.append("it was given other paths of files, which the nodes it returns may name")
    if not entries:
        return Why(name, "miss", made.key, reasons=("it was never kept", *reasons))
    found = [(_changes(e.parts, e.shown, made.parts, made.shown), e) for e in entries]
    changes, nearest = min(found, key=lambda pair: len(pair[0]))
    return Why(name, "miss", made.key, nearest.key, changes, tuple(reasons))


def _changes(
    before: dict[str, str], shown: dict[str, str], now: dict[str, str], shown_now: dict[str, str]
) -> tuple[Change, ...]:
    changes: list[Change] = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "changed" if name in before and name in now else "new"
            what = what if name in now else "gone"
            texts = shown.get(name, ""), shown_now.get(name, "")
            if texts[0] == texts[1] and what == "changed" and name.startswith("argument "):
                # Two nodes of one function, say: their outputs tell them apart.
                digests = before[name], now[name]
                texts = tuple(f"{t} {d[:8]}".lstrip() for t, d in zip(texts, digests, strict=True))
            changes.append(Change(name, what, *texts))
    return tuple(changes)


def _remarks(entry: Entry, store: Store) -> tuple[str, ...]:
    remarks = [f"it took {entry.seconds:.2f} s, and {entry.size_bytes} bytes are kept"]
    if not store.has_bytes(entry):
        remarks.append("its bytes are gone from this host: they are fetched or computed again")
    if entry.nondeterministic:
        remarks.append("it is nondeterministic: a re-evaluation gave other bytes, which stand now")
    return tuple(remarks)
