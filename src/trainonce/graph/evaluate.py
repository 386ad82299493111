"""What happens to one node: look it up, or claim it, run it, check it, and keep the result."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainonce.errors import (
    EncodingError,
    GraphError,
    InputFileError,
    InputMutatedError,
    LeaseLostError,
    NodeError,
    StoreError,
    UnhashableError,
)
from trainonce.graph import inputs
from trainonce.graph.call import Outcome, call, call_elsewhere
from trainonce.graph.expansion import Expansion, expansion_key, nodes_in, rebuild, record
from trainonce.graph.index import Entry
from trainonce.graph.keys import ActionKey, Keys
from trainonce.graph.node import File, Node
from trainonce.graph.shipping import shipped

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from trainonce.graph.store import Claim, Store

UNSET: Any = object()
_log = logging.getLogger(__name__)
_DECLARED = "it is declared with cache=False"


class OutputChangedError(Exception):
    """A node that was evaluated again gave another output: what is downstream is keyed anew."""


@dataclass(eq=False)
class Task:
    """One distinct node of a `compute` and what is known of it.

    Args:
        node: The node.
        deps: The tasks of its inputs.
        parent: The task whose function returned the node; None if it was asked for.
        expansion: What its function returned, where that holds nodes.
        recorded: The entry from which the expansion was read, and how long that took.
        output: Digest of the result, bound to the tenant; None where it has none.
        how: "hit", "run" or "shared", once it is settled.
        deferred: Somebody else evaluates it: others come first, then it is tried again.
        seconds: How long running it took here.
        doubts: Why its function may give something else the next time.
    """

    node: Node[Any]
    deps: list[Task] = field(default_factory=lambda: [])
    parent: Task | None = None
    key: ActionKey = field(default_factory=ActionKey)
    expansion: Any = UNSET
    recorded: tuple[Entry, float] | None = None
    entry: Entry | None = None
    output: str | None = None
    value: Any = UNSET
    twin: Task | None = None
    how: str = ""
    settled: bool = False
    deferred: bool = False
    seconds: float = 0.0
    doubts: list[str] = field(default_factory=lambda: [])
    gpus: tuple[int, ...] = ()
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a `compute` evaluates its nodes; see `executor.compute`.

    With `defer_s` a node that somebody else evaluates is put off after so long, and others come
    first. With `drop_values` results are not held in memory once they are stored.
    """

    store: Store | None
    executor: Executor | None = None
    refresh: bool = False
    strict: bool = False
    wait_s: float | None = None
    accept_changes: bool = False
    nested: bool = False
    drop_values: bool = False
    defer_s: float | None = None


class Evaluator:
    """Evaluates the tasks of one `compute`. Its methods run in the threads of the executor."""

    def __init__(self, settings: Settings, tasks: dict[int, Task]) -> None:
        self.settings = settings
        self._tasks = tasks
        self.keys = Keys(
            settings.store,
            strict=settings.strict,
            output_of=lambda node: self._known(node).output,
            made_from=lambda node: _made_from(self._known(node), self._known),
        )

    def look_up(self, task: Task) -> None:
        """Give a task whose inputs are settled its key, and settle it if its output is known.

        Where the nodes that its function returned are known, it has an expansion instead.

        Raises:
            InputFileError: A file or folder among its inputs cannot be read.
        """
        try:
            task.key = self.keys.make(task.node)
        except OSError as error:
            folder = isinstance(error, IsADirectoryError)
            raise InputFileError(
                f"an input of {task.node.name} cannot be read: {error}",
                hint="`once.Dir` is for folders" if folder else None,
            ) from error
        if task.parent is not None:
            above = task.parent.key
            task.key.come_from([("node", above.key), *above.lineage], above.sources)
        if self._wants_refresh(task):
            return
        entry = self._lookup(task, task.key.key)
        if entry is not None:
            self._hit(task, entry)
        else:
            self._look_up_expansion(task)

    def run(self, task: Task) -> None:
        """Run a task that was looked up in vain.

        Afterwards it is settled, or deferred, or has an expansion whose nodes come first.

        Raises:
            NodeError: Its function failed.
            InputMutatedError: Its function changed an input.
        """
        with task.lock:
            task.deferred = False
            self._run(task)

    def finish_expansion(self, task: Task) -> None:
        """Settle a task whose function returned nodes, now that these are settled."""
        try:
            if isinstance(task.expansion, Node):
                task.output = self._known(task.expansion).output
            else:
                task.output = self.keys.digest(task.expansion, "result")
        except UnhashableError as error:
            task.key.reasons.append(error.message)
        task.how, task.settled = "hit" if task.recorded else "run", True

    def value_of(self, task: Task) -> Any:
        """Return the value of a settled task, read from the store or computed again.

        Raises:
            OutputChangedError: Computed again, it was another one than its dependents are keyed on.
        """
        task = task.twin or task
        with task.lock:
            if task.value is not UNSET:
                return task.value
            if task.expansion is not UNSET:
                task.value = inputs.replace(task.expansion, lambda n: self.value_of(self._task(n)))
                return task.value
            store = self.settings.store
            loaded = store.load(task.entry) if store is not None and task.entry else None
            if store is not None and task.entry is not None and loaded is not None:
                self._note_use(task, task.entry, loaded.read_s)
                task.value = loaded.value
                return task.value
            before = task.output
            self._run(task)
            if task.output != before and not self.settings.accept_changes:
                raise OutputChangedError
            return self.value_of(task) if task.value is UNSET else task.value

    # -------------------------------------------------------- looking up

    def _known(self, node: Node[Any]) -> Task:
        """Return the task of a node; an empty one where it was not found as an input."""
        task = self._tasks.get(id(node)) or Task(node)
        return task.twin or task

    def _task(self, node: Node[Any]) -> Task:
        return self._tasks[id(node)]

    def _wants_refresh(self, task: Task) -> bool:
        return self.settings.refresh or task.node.function.options.refresh

    def _is_cached(self, task: Task) -> bool:
        options = task.node.function.options
        return bool(self.settings.store and task.key.key and options.cache and not task.key.reasons)

    def _lookup(self, task: Task, key: str) -> Entry | None:
        store = self.settings.store
        if store is None or not self._is_cached(task):
            return None
        try:
            return store.lookup(key)
        except StoreError as error:
            store.trouble(str(error))
            return None

    def _hit(self, task: Task, entry: Entry) -> None:
        task.entry, task.output, task.how, task.settled = entry, entry.output, "hit", True

    def _expansion_key(self, task: Task) -> str:
        assert self.settings.store is not None
        return self.settings.store.bind(expansion_key(task.key.key, task.node))

    def _look_up_expansion(self, task: Task) -> bool:
        """Give a task the expansion that is known of it; return whether one is."""
        store = self.settings.store
        if store is None or not self._is_cached(task):
            return False
        entry = self._lookup(task, self._expansion_key(task))
        loaded = store.load(entry) if entry is not None else None
        if entry is None or loaded is None:
            return False
        try:
            if not isinstance(loaded.value, Expansion):
                return False
            task.expansion = rebuild(loaded.value, task.node)
        except EncodingError:
            return False  # the function is called again, and says what it returns now
        task.recorded = (entry, loaded.read_s)
        return True

    def use_expansion(self, task: Task) -> None:
        """Book that a function need not be called, since what it returned is known."""
        if task.recorded is not None:
            self._note_use(task, *task.recorded)

    def _note_use(self, task: Task, entry: Entry, read_s: float) -> None:
        assert self.settings.store is not None
        options = task.node.function.options
        self.settings.store.note_use(entry, read_s, threads=options.threads, gpus=options.gpus)

    # -------------------------------------------------------- running

    def _run(self, task: Task) -> None:
        """Run a task under a claim, unless somebody else commits it meanwhile."""
        claim = self._claim(task)
        if task.deferred or (claim is None and (task.settled and task.value is not UNSET)):
            return
        if claim is None and task.recorded is not None:
            return
        try:
            if claim is None:
                self._run_claimed(task, None)
                return
            assert self.settings.store is not None
            with self.settings.store.leases.keep(claim):
                self._run_claimed(task, claim)
        finally:
            if claim is not None and self.settings.store is not None:
                self.settings.store.release(claim)

    def _claim(self, task: Task) -> Claim | None:
        """Return a claim, or None where the task is to be run without one, or is settled."""
        store = self.settings.store
        if store is None or store.read_only or not self._is_cached(task):
            return None
        wait_s = self.settings.wait_s
        deadline = float("inf") if wait_s is None else time.monotonic() + wait_s
        while True:
            try:
                claim = store.claim(task.key.key, task.node.name)
                if self._was_committed(task):
                    if claim is not None:
                        store.release(claim)
                    return None
                if claim is not None:
                    return claim
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return None  # the caller must not wait: it computes without a claim
                defer_s = self.settings.defer_s
                if not store.wait(task.key.key, min(left_s, defer_s or 600.0)) and defer_s:
                    task.deferred = True
                    return None
            except StoreError as error:
                store.trouble(str(error))
                return None

    def _was_committed(self, task: Task) -> bool:
        """Take over what somebody committed between the look-up and the claim."""
        store = self.settings.store
        if store is None or self._wants_refresh(task):
            return False
        entry = store.lookup(task.key.key)
        loaded = store.load(entry) if entry is not None else None
        if entry is None or loaded is None:
            return self._look_up_expansion(task)
        self._hit(task, entry)
        self._note_use(task, entry, loaded.read_s)
        task.value = loaded.value
        return True

    def _run_claimed(self, task: Task, claim: Claim | None) -> None:
        node = task.node
        values = {
            name: inputs.replace(value, lambda n: self.value_of(self._task(n)))
            for name, value in node.bound.arguments.items()
        }
        before = self._digests(values)
        outcome = self._call(task, values)
        if outcome.error is not None:
            raise _failure(task, outcome, values) from outcome.error
        self._check_inputs(task, values, before, outcome.mutated)
        task.seconds = outcome.seconds
        task.doubts = [*task.key.reasons, *outcome.reasons, *self._changes(task)]
        if nodes_in(outcome.value):
            self._expand(task, values, outcome, claim)
            return
        reasons = list(task.doubts)
        task.value, task.how, task.settled = outcome.value, "run", True
        try:
            task.output = self.keys.digest(outcome.value, "result")
        except UnhashableError as error:
            if isinstance(outcome.value, Iterator):
                raise _failure(task, _one_way(outcome), values) from None
            task.output = None
            reasons.append(error.message)
        if not node.function.options.cache:
            reasons.append(_DECLARED)
        self._keep(task, reasons, claim)

    def _call(self, task: Task, values: dict[str, Any]) -> Outcome:
        full = inspect.BoundArguments(task.node.bound.signature, OrderedDict(values))
        declared = [str(f.path) for f in inputs.find(values) if isinstance(f, File)]
        executor = self.settings.executor
        alone = None if self.settings.nested else task.key.alone
        if executor is None:
            return call(task.node.function, full.args, full.kwargs, declared, task.gpus, alone)
        function = shipped(task.node.function, executor)
        try:
            return executor.submit(
                call_elsewhere,
                function,
                full.args,
                full.kwargs,
                declared,
                task.gpus,
                alone,
            ).result()
        except Exception as error:
            died = isinstance(error, BrokenExecutor)
            raise GraphError(
                f"{task.node.name} cannot be run by {type(executor).__name__}: "
                f"{error or repr(error)}",
                hint="a process of the pool ended: it crashed, had too little memory, or cannot "
                "import what it was sent"
                if died
                else "a process pool needs functions that can be imported, inputs and results "
                "that pickle",
            ) from error

    def _digests(self, values: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in values.items():
            try:
                found[name] = self.keys.digest(value, name)
            except (UnhashableError, OSError):  # a file that is gone has changed
                continue
        return found

    def _check_inputs(
        self, task: Task, values: dict[str, Any], before: dict[str, str], mutated: list[str]
    ) -> None:
        after = self._digests({name: values[name] for name in before})
        changed = sorted({*mutated, *(n for n in before if after.get(n) != before[n])})
        files = [n for n in changed if any(isinstance(f, File) for f in inputs.find(values[n]))]
        if files:
            task.key.reasons.append(f"the files of {files} changed while it ran")
        if others := sorted(set(changed) - set(files)):
            raise InputMutatedError(
                f"{task.node.name} changed its input {', '.join(others)}",
                hint="work on a copy: other nodes share the input, and its digest names it",
            )

    def _changes(self, task: Task) -> list[str]:
        """Return what the key would not say if it were made now."""
        if not task.key.key:
            return []
        try:
            again = self.keys.make(task.node)
        except OSError as error:
            return [f"an input could not be read afterwards: {error}"]
        if again.key == task.key.key:
            return []
        names = {n for n, v in again.parts.items() if task.key.parts.get(n) != v}
        names |= set(task.key.parts) - set(again.parts)
        return [f"it changed what its own key is made of: {', '.join(sorted(names))}"]

    def _expand(
        self, task: Task, values: dict[str, Any], outcome: Outcome, claim: Claim | None
    ) -> None:
        """Take what a function returned, which holds nodes, and keep a record of it."""
        task.expansion, task.recorded = outcome.value, None
        store = self.settings.store
        if store is None or store.read_only:
            return
        reasons = list(task.doubts)
        if not task.node.function.options.cache:
            reasons.append(_DECLARED)
        found: Expansion | None = None
        try:
            found = record(task.node, values, outcome.value, lambda n: self.value_of(self._task(n)))
            # The form it will have when it is read, so that its nodes have the same keys.
            task.expansion = rebuild(found, task.node)
        except EncodingError as error:
            reasons.append(error.message)
        if reasons or found is None:
            self._note_uncached(task, store, reasons)
            return
        try:
            key = self._expansion_key(task)
            output = self.keys.digest(found, "expansion")
            entry = self._entry(task, key, output, returned=f"{len(found.calls)} nodes")
            replace = self._wants_refresh(task)
            stands = store.commit(entry, found, claim=claim, replace=replace, whole=True)
            if stands.output != output:
                self._look_up_expansion(task)  # somebody was first
        except LeaseLostError as error:
            store.trouble(str(error))
            self._look_up_expansion(task)
        except (EncodingError, StoreError, UnhashableError) as error:
            self._note_uncached(task, store, [error.message])

    def _entry(self, task: Task, key: str, output: str, **shown: str) -> Entry:
        return Entry(
            key=key,
            node=task.node.name,
            output=output,
            seconds=task.seconds,
            parts=task.key.parts,
            shown={**task.key.shown, **shown},
            lineage=task.key.lineage,
            sources=task.key.sources,
            numerics=task.node.function.options.numerics,
            wall_s=time.time(),
        )

    def _note_uncached(self, task: Task, store: Store, reasons: list[str]) -> None:
        task.key.reasons = reasons
        if reasons != [_DECLARED]:
            _warn(task.node.name, "; ".join(reasons))
        try:
            store.note_uncached(task.node.name, "; ".join(reasons))
        except StoreError as error:
            store.trouble(str(error))

    def _keep(self, task: Task, reasons: list[str], claim: Claim | None) -> None:
        store, made = self.settings.store, task.key
        if store is None:
            return
        if reasons:
            self._note_uncached(task, store, reasons)
            return
        try:
            self._commit(task, store, self._entry(task, made.key, task.output or ""), claim)
        except LeaseLostError as error:
            self._adopt_winner(task, store, error)
        except (EncodingError, StoreError) as error:
            made.reasons = [error.message]
            store.trouble(f"{task.node.name} was not kept: {error.message}")

    def _commit(self, task: Task, store: Store, entry: Entry, claim: Claim | None) -> None:
        replace = self._wants_refresh(task)
        stands = store.commit(entry, task.value, claim=claim, replace=replace)
        task.entry, task.output = stands, stands.output
        dropped = self.settings.drop_values and store.has_bytes(stands)
        if stands.output != entry.output or dropped:
            task.value = UNSET  # somebody was first, or whoever needs it reads it

    def _adopt_winner(self, task: Task, store: Store, error: LeaseLostError) -> None:
        store.trouble(str(error))
        entry = store.lookup(task.key.key)
        if entry is not None and entry.output != task.output:
            task.entry, task.output, task.value = entry, entry.output, UNSET


def _made_from(
    task: Task, known: Callable[[Node[Any]], Task]
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return what a settled task was made from: lineage and sources.

    An entry tells that by itself. Of what has none, what it was given and what its function
    returned counts in its place, so that forgetting a source reaches what lies beyond.
    """
    lineage = [("node", task.key.key)] if task.key.key else []
    if task.entry is not None:
        return lineage, {}
    lineage += task.key.lineage
    sources = dict(task.key.sources)
    for node in [] if task.expansion is UNSET else nodes_in(task.expansion):
        names, files = _made_from(known(node), known)
        lineage += names
        sources.update(files)
    return lineage, sources


@functools.lru_cache(maxsize=1024)
def _warn(node: str, reason: str) -> None:
    """Say once in each process why a node is evaluated each time."""
    _log.warning("%s is evaluated each time: %s", node, reason)


def _one_way(outcome: Outcome) -> Outcome:
    kind = type(outcome.value).__name__
    error = TypeError(f"it returned a {kind}, which is empty once somebody has read it: return a "
                      "list of its items")  # fmt: skip
    return Outcome(error=error)


def _failure(task: Task, outcome: Outcome, values: dict[str, Any]) -> NodeError:
    shown = ", ".join(f"{name}={inputs.describe(value)}" for name, value in values.items())
    kind = type(outcome.error).__name__
    error = NodeError(
        f"{task.node.name}({shown}) failed: {kind}: {outcome.error}\n"
        f"key: {task.key.key or 'none: ' + '; '.join(task.key.reasons)}\n{outcome.trace}",
    )
    error.node, error.key = task.node.name, task.key.key
    error.inputs, error.remote_traceback = shown, outcome.trace
    return error
