"""Measuring what levers save at equal quality, against a default and a tuned baseline.

A *task* trains a model once, under a *recipe*, and returns its loss. A *study* holds what is
compared. Choices are made on tuning seeds and a tuning split; what is reported comes from other
seeds and another split, with the choices and the margin fixed by then.

The arms that are reported: the default recipe; the tuned baseline; the cheapest tuned one that
should match the default, which is what tuning saves without any lever; the candidate that should
match each of the two; and two controls that say whether the lever did it, or merely the lower
amount of compute: the tuned baseline with a shorter schedule, and on a random subset of the data,
each cut down to the candidate's FLOPs; and the default with a schedule as much shorter as the
candidate that should match it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trainonce.errors import ConfigError, StudyPausedError
from trainonce.levers.choices import choose
from trainonce.levers.compare import MIN_SEEDS, Comparison, Trained, compare
from trainonce.levers.usage import Usage, UsageMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trainonce.ledger.energy import Meter as EnergyMeter
    from trainonce.levers.journal import Journal

    Progress = Callable[[str], None]

RERUNS = (1, 10)


@dataclass(frozen=True)
class Recipe:
    """A way to train: a name, and settings that the task understands, as plain values."""

    name: str
    settings: dict[str, Any] = field(default_factory=lambda: {})

    def changed(self, what: str, **settings: Any) -> Recipe:
        """Return the recipe with other settings, which its name tells by `what`."""
        return Recipe(f"{self.name}, {what}", {**self.settings, **settings})


class Task(Protocol):
    """A model, its data, and how to train it.

    Attributes:
        name: Of the task.
        metric: The key of what `train` returns that decides; lower is better.
        margin: The loss that two arms may differ by and still count as equal. Fixed here,
            before any run.
    """

    name: str
    metric: str
    margin: float

    def settings(self) -> dict[str, Any]:
        """Return everything beside the recipe that the result depends on, as plain values."""
        ...

    def train(
        self, recipe: Mapping[str, Any], seed: int, split: str, meter: UsageMeter
    ) -> dict[str, float]:
        """Train once, and return metrics measured on `split`, "tuning" or "reporting".

        The training itself happens within `meter.running()`, by `meter.step`.
        """
        ...

    def shorter(self, recipe: Recipe, share: float) -> Recipe:
        """Return `recipe`, under a new name, with its schedule cut to `share` of its length."""
        ...

    def subset(self, recipe: Recipe, share: float) -> Recipe:
        """Return `recipe`, under a new name, on a random `share` of the data, fixed by seed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Args:
        task: What is trained.
        default: What somebody would write without thinking about it.
        baseline: The same algorithm with other rates, horizons and so on; one is chosen.
        candidate: With the levers; one is chosen for each reference.
        tuning_seeds: For the choices.
        reporting_seeds: For what is reported, at least five.

    Raises:
        ConfigError: Seeds overlap or are too few, names repeat, or there is nothing to choose.
    """

    task: Task
    default: Recipe
    baseline: Sequence[Recipe]
    candidate: Sequence[Recipe]
    tuning_seeds: Sequence[int] = (100, 101, 102)
    reporting_seeds: Sequence[int] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        if shared := set(self.tuning_seeds) & set(self.reporting_seeds):
            raise ConfigError(
                f"seeds {sorted(shared)} are used for tuning and for reporting",
                hint="choices made on a seed would be reported on it",
            )
        if not self.tuning_seeds or len(set(self.reporting_seeds)) < MIN_SEEDS:
            raise ConfigError(
                f"{len(set(self.reporting_seeds))} reporting and {len(self.tuning_seeds)} tuning "
                "seeds are too few",
                hint=f"at least {MIN_SEEDS} for reporting and one for tuning",
            )
        names = [recipe.name for recipe in (self.default, *self.baseline, *self.candidate)]
        if not self.baseline or not self.candidate or len(set(names)) < len(names):
            raise ConfigError(
                "a study needs baselines and candidates, each with a name of its own",
                hint="got " + ", ".join(names),
            )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One reported arm: its recipe, its runs, and how it compares.

    Args:
        role: "default", "tuned", "tuned-fast", "candidate", "candidate-fast", "shorter",
            "subset" or "default-shorter".
        recipe: What was run.
        tuning: What the choice of this recipe used, over all that was tried.
        runs: One a reporting seed.
        against_default: None for the default itself.
        against_tuned: None for the tuned baseline itself.
    """

    role: str
    recipe: Recipe
    tuning: Usage
    runs: list[Trained]
    against_default: Comparison | None = None
    against_tuned: Comparison | None = None


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study found.

    Args:
        study: What was asked.
        arms: By role.
        tuning: Every run that choices were made on, by recipe name.
        notes: What was left out, and why.
    """

    study: Study
    arms: dict[str, Arm]
    tuning: dict[str, list[Trained]]
    notes: list[str]


def run_study(
    study: Study,
    *,
    device: str = "cpu",
    energy: EnergyMeter | None = None,
    progress: Progress = lambda _line: None,
    journal: Journal | None = None,
    pause: Callable[[], bool] = lambda: False,
) -> StudyResult:
    """Tune, fix the choices (`trainonce.levers.choices`), and run every arm on the other seeds.

    Args:
        study: What is compared.
        device: Where the task trains; for the clocks.
        energy: Measures joules, if anything does.
        progress: Told of each run.
        journal: Finished runs are taken from it, and added to it.
        pause: Asked before each run that is not finished.

    Raises:
        StudyPausedError: `pause` said so; with a journal, the next call goes on from there.
    """
    bench = _Bench(study, device, energy, progress, journal, pause)
    tuning = {
        recipe.name: bench.train(recipe, study.tuning_seeds, "tuning")
        for recipe in (study.default, *study.baseline, *study.candidate)
    }
    choices = choose(study, tuning)
    arms = bench.report(choices.recipes)
    return StudyResult(study=study, arms=arms, tuning=tuning, notes=choices.notes)


class _Bench:
    """Trains arms, each recipe and seed once."""

    def __init__(
        self,
        study: Study,
        device: str,
        energy: EnergyMeter | None,
        progress: Progress,
        journal: Journal | None,
        pause: Callable[[], bool],
    ) -> None:
        self._study = study
        self._device = device
        self._energy = energy
        self._progress = progress
        self._journal = journal
        self._pause = pause
        self._done: dict[tuple[str, int, str], Trained] = {}

    def train(self, recipe: Recipe, seeds: Sequence[int], split: str) -> list[Trained]:
        """Train `recipe` on every seed; what was trained already is not trained again."""
        for seed in seeds:
            key = (recipe.name, seed, split)
            if key not in self._done:
                self._done[key] = self._known_or_trained(recipe, seed, split)
        return [self._done[recipe.name, seed, split] for seed in seeds]

    def _known_or_trained(self, recipe: Recipe, seed: int, split: str) -> Trained:
        def train() -> Trained:
            if self._pause():
                raise StudyPausedError(
                    "the study is paused", hint="the same call goes on from here"
                )
            self._progress(f"{self._study.task.name}: {split}, {recipe.name}, seed {seed}")
            return self._train_once(recipe, seed, split)

        if self._journal is None:
            return train()
        return self._journal.get_or_train(self._study.task, recipe, seed, split, train)

    def _train_once(self, recipe: Recipe, seed: int, split: str) -> Trained:
        task = self._study.task
        meter = UsageMeter(self._device, self._energy)
        metrics = task.train(recipe.settings, seed, split, meter)
        if task.metric not in metrics:
            raise ConfigError(
                f"task {task.name} returned {sorted(metrics)}, and not {task.metric}",
                hint="its train must return the metric that it names",
            )
        return Trained(seed=seed, loss=metrics[task.metric], metrics=metrics, usage=meter.total())

    def report(self, chosen: Mapping[str, tuple[Recipe, Usage]]) -> dict[str, Arm]:
        """Run the chosen recipes on the reporting seeds, and compare them."""
        seeds, margin = self._study.reporting_seeds, self._study.task.margin
        runs = {
            role: self.train(recipe, seeds, "reporting") for role, (recipe, _) in chosen.items()
        }
        return {
            role: Arm(
                role=role,
                recipe=recipe,
                tuning=cost,
                runs=runs[role],
                against_default=None
                if role == "default"
                else compare(runs["default"], runs[role], margin),
                against_tuned=None
                if role == "tuned"
                else compare(runs["tuned"], runs[role], margin),
            )
            for role, (recipe, cost) in chosen.items()
        }


def saved_with_tuning(reference: Arm, arm: Arm, reruns: int, kind: str = "flops") -> float | None:
    """Return the share saved when tuning is paid once and the run `reruns` times, on both sides.

    None where `kind` was not measured.
    """
    costs: list[float] = []
    for each in (reference, arm):
        tuning = getattr(each.tuning, kind)
        runs = [getattr(run.usage, kind) for run in each.runs]
        if None in runs or (tuning is None and each.role != "default"):
            return None
        costs.append((tuning or 0) + reruns * sum(runs) / len(runs))
    return 1 - costs[1] / costs[0]
