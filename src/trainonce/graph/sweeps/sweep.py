"""`sweep`: trials that share prefixes, each distinct stage trained once, ever."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.graph.evaluate import UNSET
from trainonce.graph.executor import compute, settle, store_at
from trainonce.graph.keys import Keys
from trainonce.graph.store import Store
from trainonce.graph.sweeps.tree import Stage, boundaries, distinct_steps, stages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from trainonce.graph.evaluate import Task
    from trainonce.graph.index import Entry
    from trainonce.graph.node import Node
    from trainonce.graph.progress import Progress
    from trainonce.graph.sweeps.segment import Segment
    from trainonce.graph.sweeps.trial import Trial


@dataclass(frozen=True, eq=False)
class Result:
    """What became of one trial.

    Args:
        trial: The trial.
        value: What `evaluate` gave; None without one.
    """

    trial: Trial
    value: Any
    _store: Store

    def state(self) -> dict[str, Any]:
        """Return the final state, read from the store; trained again where it is gone.

        It is `{"objects": {name: ...}, "generators": ...}`; `restore` of
        `trainonce.graph.sweeps.state` brings built objects into it.
        """
        trial = self.trial
        return compute(trial.segment.node_at(trial, trial.num_steps, None, 0), store=self._store)


@dataclass(frozen=True)
class Report:
    """What a sweep did. Printing it tells the tree's bound and what was reached.

    Args:
        results: One for each trial, in their order.
        steps_alone: What the trials would train one by one.
        steps_tree: Distinct steps: the least that anyone could train with an empty store.
        steps_needed: Those of them that were not stored when the sweep began.
        steps_computed: Trained here, those that had to be trained again included.
        steps_elsewhere: Trained by other processes meanwhile.
        segments: Stages that were needed.
        train_s: Seconds that training took here.
        total_s: Seconds from beginning to end.
        uncached: Why segments were not stored; empty if they were.
    """

    results: list[Result]
    steps_alone: int
    steps_tree: int
    steps_needed: int
    steps_computed: int
    steps_elsewhere: int
    segments: int
    train_s: float
    total_s: float
    uncached: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """Times less training than alone, at best, from an empty store."""
        return self.steps_alone / self.steps_tree

    @property
    def reached(self) -> float:
        """Share of the bound that was reached: steps needed over steps trained."""
        trained = self.steps_computed + self.steps_elsewhere
        return self.steps_needed / trained if trained else 1.0

    def __str__(self) -> str:
        stored = self.steps_tree - self.steps_needed
        reasons = "".join(f"; not stored: {reason}" for reason in self.uncached)
        return (
            f"{len(self.results)} trials of {self.steps_alone:,} steps together; their tree has "
            f"{self.steps_tree:,} ({self.bound:.2f}x less), {stored:,} of them stored before; "
            f"{self.steps_computed:,} trained here, {self.steps_elsewhere:,} elsewhere: "
            f"{100 * self.reached:.1f} % of the bound; {self.train_s:.2f} s of "
            f"{self.total_s:.2f} s were training{reasons}"
        )


def sweep(
    trials: Sequence[Trial],
    *,
    store: Store | str | Path | None = None,
    save_every: int | None = None,
    wait_s: float | None = None,
    progress: bool | Callable[[Progress], None] = False,
) -> Report:
    """Train trials, each prefix that they share once, and reuse what earlier sweeps trained.

    Sharing means equal values of every hyperparameter at every step. Several processes that
    sweep over one store share the stages; one that dies loses its unfinished ones.

    Args:
        trials: Made by `Segment.trial`.
        store: A store, or where it is; `TRAINONCE_STORE` or the default folder if None.
        save_every: Keep states at the multiples of so many steps as well, so that a process
            that is killed loses no more.
        wait_s: How long to wait for a stage that another process trains, before it is trained
            here as well; without end if None.
        progress: Show counts and the time left on stderr, or call this with a `Progress`.

    Raises:
        NodeError: A trial failed; what was trained before is stored.
        ConfigError: There are no trials.
    """
    if not trials:
        raise ConfigError("a sweep needs at least one trial")
    opened = store if isinstance(store, Store) else store_at(store)
    started = time.perf_counter()
    for segment in {trial.segment for trial in trials}:
        segment.evaluate_inputs(opened)
    plan = _Plan(list(trials), opened, save_every)
    wanted = plan.build()
    # Segments set the global generators, so that in one process they run one after the other.
    threads = max(trial.segment.advance.options.threads for trial in trials)
    tasks = settle([*plan.ends, *wanted], opened, workers=threads, wait_s=wait_s, progress=progress)
    return plan.report(tasks, time.perf_counter() - started)


class _Plan:
    """Which stages of a sweep are there, which are to be trained, and their nodes."""

    def __init__(self, trials: list[Trial], store: Store, save_every: int | None) -> None:
        self._trials = trials
        self._store = store
        cuts = boundaries(trials, save_every)
        self._stages = [stages(trial, ends) for trial, ends in zip(trials, cuts, strict=True)]
        self._nodes: dict[tuple[int, bytes], Node[Any]] = {}
        self._needed: dict[tuple[int, bytes], tuple[Stage, Node[Any]]] = {}
        self._known: dict[tuple[int, bytes], bool] = {}
        self._lengths: dict[int, list[int]] = {}
        self._measures: set[int] = set()
        # The evaluations; the states where there are none.
        self.ends: list[Node[Any]] = []
        self._keys = Keys(
            store, strict=False, output_of=lambda node: None, made_from=lambda node: ([], {})
        )

    def build(self) -> list[Node[Any]]:
        """Make the nodes of all that is needed; return those of the stages to be trained."""
        for number, (trial, own) in enumerate(zip(self._trials, self._stages, strict=True)):
            segment = trial.segment
            if segment.evaluate is None:
                self.ends.append(self._chain(trial, own))
                continue
            measure = segment.measure_at(trial, None)
            if not self._is_stored(measure):
                measure = segment.measure_at(trial, self._chain(trial, own))
            self._measures.add(number)
            self.ends.append(measure)
        return [node for _, node in self._needed.values()]

    def report(self, tasks: list[Task], total_s: float) -> Report:
        """Return what became of it; `tasks` are those of the ends, then of the stages."""
        ends, trained = tasks[: len(self.ends)], tasks[len(self.ends) :]
        results = [
            Result(trial, self._value(trial, task) if n in self._measures else None, self._store)
            for n, (trial, task) in enumerate(zip(self._trials, ends, strict=True))
        ]
        computed = elsewhere = 0
        train_s = 0.0
        reasons: dict[str, None] = {}
        for (stage, _), task in zip(self._needed.values(), trained, strict=True):
            task = task.twin or task
            if task.how == "run":
                computed += stage.last - stage.first
                train_s += task.seconds
                if task.entry is None:
                    reasons |= dict.fromkeys(task.key.reasons)
            else:
                elsewhere += stage.last - stage.first
        needed = [stage for stage, _ in self._needed.values()]
        return Report(
            results=results,
            steps_alone=sum(trial.num_steps for trial in self._trials),
            steps_tree=distinct_steps(one for own in self._stages for one in own),
            steps_needed=distinct_steps(needed),
            steps_computed=computed,
            steps_elsewhere=elsewhere,
            segments=len(needed),
            train_s=train_s,
            total_s=total_s,
            uncached=tuple(reasons),
        )

    def _chain(self, trial: Trial, own: list[Stage]) -> Node[Any]:
        """Return the node of a trial's end, over those of its stages back to a stored state."""
        node, first = self._stored_root(trial, own)
        for stage in own:
            if stage.last <= first:
                continue
            stage = Stage(trial, first, stage.last)
            known = self._nodes.get(stage.name)
            if known is None:
                known = trial.segment.node_at(trial, stage.last, node, first)
                self._nodes[stage.name] = known
                self._needed[stage.name] = (stage, known)
            node, first = known, stage.last
        assert node is not None
        return node

    def _stored_root(self, trial: Trial, own: list[Stage]) -> tuple[Node[Any] | None, int]:
        """Return the longest prefix of a trial whose state is stored, and how long it is."""
        steps = {stage.last for stage in own} | set(self._stored_lengths(trial.segment))
        for length in sorted(steps, reverse=True):
            if length > trial.num_steps:
                continue
            name = Stage(trial, 0, length).name
            if name in self._needed:
                return self._nodes[name], length  # a trial before it has planned this one
            if name not in self._known:
                # Should its bytes turn out damaged, it is trained anew from the beginning.
                node = trial.segment.node_at(trial, length, None, 0)
                self._known[name] = self._is_stored(node)
                if self._known[name]:
                    self._nodes[name] = node
            if self._known[name]:
                return self._nodes[name], length
        return None, 0

    def _is_stored(self, node: Node[Any]) -> bool:
        made = self._keys.make(node)
        entry = self._store.lookup(made.key) if made.key and not made.reasons else None
        return entry is not None and self._is_there(entry)

    def _value(self, trial: Trial, task: Task) -> Any:
        """Return what a trial was judged to be, read from the store where it is not at hand."""
        task = task.twin or task
        if task.value is not UNSET:
            return task.value
        return compute(trial.segment.measure_at(trial, None), store=self._store)

    def _is_there(self, entry: Entry) -> bool:
        return self._store.has_bytes(entry) or (
            self._store.remote is not None and self._store.load(entry) is not None
        )

    def _stored_lengths(self, segment: Segment) -> list[int]:
        """Return after how many steps states of this segment were stored by anyone."""
        if id(segment) not in self._lengths:
            entries = self._store.index.entries(segment.advance.name)
            shown = {entry.shown.get("argument steps", "") for entry in entries}
            self._lengths[id(segment)] = [int(text) for text in shown if text.isdigit()]
        return self._lengths[id(segment)]
