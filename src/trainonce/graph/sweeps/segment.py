"""`Segment`: how a run is built and advanced, so that any stretch of it can be a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainonce.graph.code_objects import full_name
from trainonce.graph.executor import compute
from trainonce.graph.inputs import find
from trainonce.graph.node import Node, NodeFunction, Options
from trainonce.graph.numerics import pinned_threads
from trainonce.graph.sweeps.state import borrowed_generators, capture, restore
from trainonce.graph.sweeps.trial import Schedule, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trainonce.graph.store import Store
    from trainonce.graph.sweeps.trial import Runs


class Segment:
    """A training run that can be stopped, stored and gone on with at any step.

    ::

        segment = once.Segment(build, step, evaluate=accuracy, inputs={"images": images})
        trials = [segment.trial(100, lr={0: 0.1, at: 0.01}) for at in (60, 70, 80, 90)]
        report = once.sweep(trials)

    What makes a run go on exactly is what `build` returns, and the global generators: models,
    optimizers, schedulers, loaders and anything else with `state_dict` and `load_state_dict`,
    generators, and plain values. What else a step changes is lost between segments.

    Args:
        build: `build(hyper, **inputs)` returns the objects of a run by name. `hyper` holds the
            hyperparameters at step 0. The global generators are seeded with 0 before.
        step: `step(objects, hyper, index)` trains one step; what it returns is dropped.
        evaluate: `evaluate(objects)` returns what a trial is judged by: numbers, arrays, or
            containers of these. Results are kept like those of nodes.
        inputs: Values for `build`; nodes, files and folders among them are inputs.
        version: Stands for the code in the keys; see `node`.
        numerics: "exact" adds device model, torch build and thread count to the keys.
        threads: CPU threads that a segment occupies, pinned where numerics are exact.
        gpus: GPUs that a segment occupies.
    """

    def __init__(
        self,
        build: Callable[..., dict[str, Any]],
        step: Callable[[dict[str, Any], dict[str, Any], int], object],
        *,
        evaluate: Callable[[dict[str, Any]], Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        version: str | None = None,
        numerics: str = "exact",
        threads: int = 1,
        gpus: int = 0,
    ) -> None:
        self.build, self.step, self.evaluate = build, step, evaluate
        self.inputs = dict(inputs or {})
        self.name = full_name(step)

        def advance(
            prefix: str, steps: int, start: dict[str, Any], inputs: dict[str, Any],
            first: int, runs: Runs, state: dict[str, Any] | None,
        ) -> dict[str, Any]:  # fmt: skip
            return train(build, step, inputs, start, first, runs, state)

        def measure(
            prefix: str, steps: int, start: dict[str, Any], inputs: dict[str, Any],
            runs: Runs, state: dict[str, Any] | None,
        ) -> Any:  # fmt: skip
            assert evaluate is not None
            if state is None:  # it was stored once, and turned out damaged
                state = train(build, step, inputs, start, 0, runs, None)
            with borrowed_generators():
                objects = build(dict(start), **inputs)
                restore(objects, state)
                return evaluate(objects)

        # What a state is named by are the values of all steps before it, whichever way it was
        # reached: trained at once, in parts, or forked from another trial's state.
        def options(*ignored: str) -> Options:
            return Options(version=version, ignore=ignored, numerics=numerics, threads=threads,
                           gpus=gpus)  # fmt: skip

        self.advance: NodeFunction[..., dict[str, Any]] = NodeFunction(
            advance, options("first", "runs", "state")
        )
        self.measure: NodeFunction[..., Any] = NodeFunction(measure, options("runs", "state"))
        self.advance.name = f"segment of {self.name}"
        self.measure.name = f"evaluation of {self.name}"
        self.advance.code = (advance, build, step)
        self.measure.code = (measure, build, step, *([evaluate] if evaluate else []))
        # Both set the global generators, which all threads share.
        self.advance.alone = self.measure.alone = True

    def trial(self, num_steps: int, **schedules: Schedule) -> Trial:
        """Return a run of so many steps under these hyperparameters.

        Args:
            num_steps: How long it trains.
            schedules: Name -> a value, a function of the step (from 0), a mapping from the first
                step at which a value holds, or a list with one value a step.
        """
        return Trial(self, num_steps, schedules)

    def run(self, trial: Trial) -> tuple[dict[str, Any], Any]:
        """Train a trial alone, in one go and past any store; inputs must not be nodes.

        Returns:
            Its final state, and what `evaluate` makes of it (None without).
        """
        start = trial.values(0)
        runs = trial.runs(0, trial.num_steps)
        options = self.advance.options
        with pinned_threads(options.threads if options.numerics == "exact" else None):
            state = train(self.build, self.step, self.inputs, start, 0, runs, None)
            if self.evaluate is None:
                return state, None
            return state, self.measure.function("", 0, start, self.inputs, runs, state)

    def node_at(self, trial: Trial, steps: int, parent: Node[Any] | None, first: int) -> Node[Any]:
        """Return the node of a trial's state after so many steps.

        Args:
            trial: Whose hyperparameters.
            steps: Where the state is.
            parent: The node of the state to go on from; None to begin anew.
            first: Where that state is.
        """
        return self.advance(
            prefix=trial.prefixes[steps].hex(), steps=steps, start=trial.values(0),
            inputs=self.inputs, first=first, runs=trial.runs(first, steps), state=parent,
        )  # fmt: skip

    def measure_at(self, trial: Trial, state: Node[Any] | None) -> Node[Any]:
        """Return the node that evaluates the end of a trial, whose state is trained if None."""
        return self.measure(
            prefix=trial.prefixes[-1].hex(), steps=trial.num_steps, start=trial.values(0),
            inputs=self.inputs, runs=trial.runs(0, trial.num_steps), state=state,
        )  # fmt: skip

    def evaluate_inputs(self, store: Store) -> None:
        """Put values in the place of nodes among the inputs."""
        if any(isinstance(found, Node) for found in find(self.inputs)):
            self.inputs = compute(self.inputs, store=store)


def train(
    build: Callable[..., dict[str, Any]],
    step: Callable[[dict[str, Any], dict[str, Any], int], object],
    inputs: dict[str, Any],
    start: dict[str, Any],
    first: int,
    runs: Runs,
    state: dict[str, Any] | None,
) -> dict[str, Any]:
    """Build the objects of a run, go on from `state`, and return the state some steps later."""
    with borrowed_generators():
        objects = build(dict(start), **inputs)
        if state is not None:
            restore(objects, state)
        index = first
        for count, hyper in runs:
            for _ in range(count):
                step(objects, dict(hyper), index)
                index += 1
        return capture(objects)
