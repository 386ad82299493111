"""`compute`: each distinct node once, independent ones in parallel.

The scheduler runs in the calling thread and owns all decisions; pool threads look nodes up and
run them. A node is looked up when its inputs are settled, and its inputs are read only if it has
to run.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainonce import settings
from trainonce.errors import ConfigError, GraphError
from trainonce.graph import inputs
from trainonce.graph.evaluate import UNSET, Evaluator, OutputChangedError, Settings, Task
from trainonce.graph.expansion import inputs_first, nodes_in
from trainonce.graph.progress import Plan, Printer, Progress, Step
from trainonce.graph.purity import Watch, unwatched, watch_here
from trainonce.graph.store import Store, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from trainonce.graph.node import Node

# An output that changes at every re-evaluation would have its dependents keyed anew for ever.
_MAX_RESTARTS = 3
_DEFER_S = 0.2
# Whoever evaluates a node may be waiting in a collective for the rank that asks for it. Ranks
# that ask at the same moment are worth a short wait; a longer one could be a deadlock.
_RANK_WAIT_S = 5.0


def compute(
    *values: Any,
    store: Store | str | Path | None = None,
    executor: Executor | str = "threads",
    workers: int | None = None,
    refresh: bool = False,
    strict: bool = False,
    wait_s: float | None = None,
    dry_run: bool = False,
    progress: bool | Callable[[Progress], None] = False,
) -> Any:
    """Evaluate nodes: each distinct one once, here and in every process that shares the store.

    Args:
        values: Nodes, or lists, tuples, dicts and dataclasses that hold nodes.
        store: A store, or where it is; `TRAINONCE_STORE` or the default folder if None.
        executor: "threads" of this process; "processes", for functions that can be imported;
            or any `concurrent.futures.Executor`, which then decides where GPUs are.
        workers: CPU threads that nodes may occupy together; all of this host by default.
        refresh: Evaluate every node, and keep the new results.
        strict: Read every input file, even if its size and time stamps are unchanged.
        wait_s: How long to wait for a node that another process evaluates, before it is
            evaluated here as well; without end if None, except that a process that has joined
            a process group of `torch.distributed` waits for 5 s at most.
        dry_run: Run nothing; return a `Plan` of what would run.
        progress: Show counts, hits and the time left on stderr, or call this with a `Progress`.

    Returns:
        The value for one argument, a tuple for several.

    Raises:
        NodeError: A function failed; it holds the node's key, inputs and traceback.
        InputMutatedError: A function changed its input.
        InputFileError: A file or folder among the inputs cannot be read.
        ConfigError: A node wants more GPUs than there are.
        GraphError: The executor cannot run a node, or a node waits for itself.
    """
    outer = watch_here()
    with unwatched():
        opened = store if isinstance(store, Store) else store_at(store)
        if wait_s is None and _is_distributed():
            wait_s = _RANK_WAIT_S
        nested = outer is not None
        how = Settings(store=opened, refresh=refresh, strict=strict, wait_s=wait_s, nested=nested)
        if dry_run:
            return _Run(values, how, Resources.of(workers), None).plan()
        show = Printer() if progress is True else (progress or None)
        with _opened(executor, workers) as inner:
            how = replace(how, executor=inner)
            run, results = _finish(
                values, how, Resources.of(workers, elsewhere=isinstance(executor, Executor)), show
            )
    if outer is not None:
        run.tell(outer)
    return results[0] if len(results) == 1 else tuple(results)


def _finish(
    values: tuple[Any, ...],
    how: Settings,
    resources: Resources,
    show: Callable[[Progress], None] | None,
) -> tuple[_Run, list[Any]]:
    """Evaluate everything; what is downstream of an output that changed runs again."""
    for attempt in range(_MAX_RESTARTS + 1):
        how = replace(how, accept_changes=attempt == _MAX_RESTARTS)
        run = _Run(values, how, replace(resources), show)
        try:
            return run, run.results()
        except OutputChangedError:
            # Its dependents are keyed on an output that no longer stands. What was
            # evaluated is in the store; only what is downstream runs again. What was asked
            # to be fresh has been.
            how = replace(how, refresh=False)
    raise AssertionError("the last attempt accepts changes")


_stores: dict[tuple[int, str], Store] = {}


def store_at(location: str | Path | None) -> Store:
    """Return the store of a location, opened once in each process."""
    key = (os.getpid(), str(location or settings.STORE.get() or settings.home()))
    store = _stores.get(key)
    if store is None or not store.index.db.path.exists():
        store = _stores[key] = open_store(location)
    return store


def settle(
    nodes: list[Node[Any]],
    store: Store,
    *,
    workers: int | None = None,
    wait_s: float | None = None,
    progress: bool | Callable[[Progress], None] = False,
) -> list[Task]:
    """Evaluate nodes into the store without holding their values; return what became of each.

    Options are those of `compute`.
    """
    show = Printer() if progress is True else (progress or None)
    how = Settings(
        store=store, wait_s=wait_s, nested=watch_here() is not None, accept_changes=True,
        drop_values=True, defer_s=_DEFER_S,
    )  # fmt: skip
    run = _Run(tuple(nodes), how, Resources.of(workers), show)
    run.settle()
    return [run.task_of(node) for node in nodes]


def plan_of(node: Node[Any], store: Store, resources: Resources) -> tuple[Task, Plan]:
    """Return what is known of a node without running anything: its task, and all that it needs."""
    run = _Run((node,), Settings(store=store), resources, None)
    plan = run.plan()
    return run.task_of(node), plan


@dataclass
class Resources:
    """What running nodes occupy: CPU threads, and GPUs by index.

    With `elsewhere` nodes run where this process does not know what GPUs there are.
    """

    threads: int
    elsewhere: bool = False

    def __post_init__(self) -> None:
        self.gpus: list[int] = []
        self.total_threads = self.threads
        self._knows_gpus = False

    @classmethod
    def of(cls, workers: int | None, *, elsewhere: bool = False) -> Resources:
        """Return what this host has; `workers` limits the threads."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cls(workers or cpus or 1, elsewhere)

    def need(self, task: Task) -> tuple[int, int]:
        """Return the threads and GPUs of a task; more threads than there are take all."""
        options = task.node.function.options
        return min(options.threads, self.total_threads), 0 if self.elsewhere else options.gpus

    def check(self, task: Task) -> None:
        """Raise `ConfigError` if a task can never run here."""
        wanted = self.need(task)[1]
        if wanted and not self._knows_gpus:
            import torch

            self.gpus = list(range(torch.cuda.device_count()))
            self.total_gpus = len(self.gpus)
            self._knows_gpus = True
        if wanted and wanted > self.total_gpus:
            raise ConfigError(
                f"{task.node.name} wants {wanted} GPUs, and this host has {self.total_gpus}",
                hint="lower `gpus=`, or give an executor of a cluster that has them",
            )

    def try_take(self, task: Task) -> bool:
        """Occupy what a task needs, if it is free."""
        threads, gpus = self.need(task)
        if threads > self.threads or gpus > len(self.gpus):
            return False
        self.threads -= threads
        task.gpus, self.gpus = tuple(self.gpus[:gpus]), self.gpus[gpus:]
        return True

    def give_back(self, task: Task) -> None:
        """Free what a task occupied."""
        self.threads += self.need(task)[0]
        self.gpus += task.gpus
        task.gpus = ()


class _Run:
    """One attempt at a `compute`: the tasks, and who waits for whom."""

    def __init__(
        self,
        values: tuple[Any, ...],
        settings: Settings,
        resources: Resources,
        show: Callable[[Progress], None] | None,
    ) -> None:
        self._values = values
        self._resources = resources
        self._show = show
        self._tasks: dict[int, Task] = {}
        self._by_key: dict[str, Task] = {}
        self._waiting: dict[Task, set[Task]] = {}
        self._dependents: dict[Task, list[Task]] = {}
        self._runnable: deque[Task] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._events: queue.SimpleQueue[tuple[str, Task, Future[None]]] = queue.SimpleQueue()
        self._in_flight = 0
        self._running = 0
        self._evaluator = Evaluator(settings, self._tasks)
        self._store = settings.store

    def results(self) -> list[Any]:
        """Evaluate everything and return the values in the place of the nodes."""
        self.settle()
        take = self._evaluator.value_of
        return [inputs.replace(v, lambda n: take(self._tasks[id(n)])) for v in self._values]

    def tell(self, outer: Watch) -> None:
        """Tell the node within which this ran what its nodes read, and why one is not kept."""
        for task in self._tasks.values():
            if task.twin is None:
                outer.take_over(task.node.name, task.doubts, task.key.sources)

    def settle(self) -> None:
        """Evaluate everything."""
        with ThreadPoolExecutor(self._resources.total_threads, "trainonce-node") as pool:
            self._pool = pool
            try:
                self._add(self._values)
                while self._in_flight:
                    self._step(*self._events.get())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for task in self._tasks.values():
            if not task.settled:
                raise GraphError(
                    f"{task.node.name} waits for itself: a node that it returns needs its result",
                    hint="let the recursion end: return a call with other arguments, or a value",
                )

    def task_of(self, node: Node[Any]) -> Task:
        """Return the task of a node."""
        return self._tasks[id(node)]

    def plan(self) -> Plan:
        """Return what would be done, looking up what can be."""
        steps: list[Step] = []
        self._plan(self._discover(self._values), steps)
        return Plan(steps)

    def _plan(self, tasks: list[Task], steps: list[Step]) -> None:
        for task in tasks:
            action = "unknown"
            if all(dep.settled for dep in task.deps):
                self._evaluator.look_up(task)
                twin = self._by_key.setdefault(task.key.key or str(id(task)), task)
                if twin is not task:
                    task.twin, task.settled = twin, twin.settled
                    continue
                action = "hit" if task.settled or task.expansion is not UNSET else "run"
            reasons = () if action == "hit" else tuple(task.key.reasons)
            steps.append(
                Step(task.node.name, action, task.key.key, self._last_seconds(task), reasons)
            )
            if task.expansion is not UNSET:
                self._plan(self._discover(task.expansion, parent=task), steps)
                if all(self._tasks[id(node)].settled for node in nodes_in(task.expansion)):
                    self._evaluator.finish_expansion(task)

    # -------------------------------------------------------- building

    def _add(self, value: object, parent: Task | None = None) -> None:
        """Add the nodes in `value`, and schedule those whose inputs are settled."""
        added = self._discover(value, parent)
        for task in added:
            self._resources.check(task)
            self._wait_for(task, task.deps)
        if parent is not None:
            self._wait_for(parent, [self._tasks[id(n)] for n in nodes_in(value)])
        for task in added:
            if not self._waiting[task]:
                self._submit("look up", self._evaluator.look_up, task)

    def _discover(self, value: object, parent: Task | None = None) -> list[Task]:
        """Make tasks for all new nodes in `value` and below, inputs first."""
        added: list[Task] = []
        for node in inputs_first(value, lambda node: id(node) in self._tasks):
            deps = [self._tasks[id(n)] for n in nodes_in(node.bound.arguments)]
            self._tasks[id(node)] = Task(node, deps=deps, parent=parent)
            added.append(self._tasks[id(node)])
        return added

    def _wait_for(self, task: Task, deps: list[Task]) -> None:
        open_deps = {dep for dep in deps if not dep.settled}
        self._waiting[task] = open_deps
        for dep in open_deps:
            self._dependents.setdefault(dep, []).append(task)

    # -------------------------------------------------------- running

    def _submit(self, stage: str, work: Callable[[Task], None], task: Task) -> None:
        assert self._pool is not None
        future = self._pool.submit(work, task)
        self._in_flight += 1
        future.add_done_callback(lambda done: self._events.put((stage, task, done)))

    def _step(self, stage: str, task: Task, done: Future[None]) -> None:
        """React to the end of one piece of work."""
        self._in_flight -= 1
        if stage == "run":
            self._running -= 1
            self._resources.give_back(task)
        done.result()
        if stage == "look up":
            self._looked_up(task)
        elif task.deferred:
            self._runnable.append(task)
        elif task.expansion is not UNSET and not task.settled:
            self._expanded(task)
        else:
            self._settled(task)
        self._dispatch()
        self._report()

    def _looked_up(self, task: Task) -> None:
        twin = self._by_key.setdefault(task.key.key, task) if task.key.key else task
        if twin is not task:
            # Equal calls are one node: this one is whatever the first one turns out to be.
            task.twin = twin
            self._wait_for(task, [twin])
            if not self._waiting[task]:
                self._settled(task)
        elif task.settled:
            self._settled(task)
        elif task.expansion is not UNSET:
            self._expanded(task)
        else:
            self._runnable.append(task)

    def _expanded(self, task: Task) -> None:
        """Go on with the nodes that a function returned, now or when it was recorded."""
        self._evaluator.use_expansion(task)
        self._add(task.expansion, parent=task)
        if not self._waiting[task]:
            self._settled(task)

    def _dispatch(self) -> None:
        for _ in range(len(self._runnable)):
            task = self._runnable.popleft()
            if self._resources.try_take(task):
                self._running += 1
                self._submit("run", self._evaluator.run, task)
            else:
                self._runnable.append(task)

    def _settled(self, task: Task) -> None:
        """Note that a task is settled, and go on with those that waited for it."""
        if task.twin is not None:
            task.settled, task.how = True, "shared"
        elif task.expansion is not UNSET and not task.settled:
            self._evaluator.finish_expansion(task)
        for dependent in self._dependents.pop(task, []):
            waiting = self._waiting[dependent]
            waiting.discard(task)
            if waiting:
                continue
            if dependent.twin is not None or dependent.expansion is not UNSET:
                self._settled(dependent)
            else:
                self._submit("look up", self._evaluator.look_up, dependent)

    def _report(self) -> None:
        if self._show is None:
            return
        tasks = [task for task in self._tasks.values() if task.twin is None]
        done = [task for task in tasks if task.settled]
        known = [self._last_seconds(task) for task in tasks if not task.settled]
        times = [seconds for seconds in known if seconds is not None]
        hits = sum(task.how == "hit" for task in done)
        left_s = sum(times) if times else None
        self._show(Progress(len(tasks), len(done), hits, self._running, left_s))

    def _last_seconds(self, task: Task) -> float | None:
        if self._store is None:
            return None
        if task.entry is not None:
            return task.entry.seconds
        return self._store.index.last_seconds(task.node.name)


def _is_distributed() -> bool:
    import sys

    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


@contextmanager
def _opened(executor: Executor | str, workers: int | None) -> Generator[Executor | None]:
    if isinstance(executor, Executor):
        yield executor
    elif executor == "threads":
        yield None
    elif executor == "processes":
        # Not fork: this process has threads, and perhaps CUDA.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(Resources.of(workers).threads, mp_context=context) as pool:
            yield pool
    else:
        raise ConfigError(
            f"executor={executor!r} is none of 'threads', 'processes'",
            hint="or give a `concurrent.futures.Executor`",
        )
