"""Which recipes a study reports, chosen by what they reached and used on the tuning seeds.

The tuned baseline is the one that needs the fewest FLOPs among those within half the margin of
the best baseline's loss. A candidate is the one that needs the fewest FLOPs among those that
pass on the tuning seeds what will be asked of them on the others: a mean no worse than the
reference's, and an upper bound of the paired difference within the margin. If there is none,
the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError
from trainonce.levers.compare import mean_loss, upper_bound
from trainonce.levers.usage import Usage, add_usage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trainonce.levers.compare import Trained
    from trainonce.levers.harness import Recipe, Study

# A control cut down by less than this is what it controls itself.
_LEAST_CUT = 0.05


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is run on the reporting seeds.

    Args:
        recipes: Role to (recipe, what its choice used).
        notes: What was left out, and why.
    """

    recipes: dict[str, tuple[Recipe, Usage]]
    notes: list[str]


def choose(study: Study, tuning: Mapping[str, list[Trained]]) -> Choices:
    """Choose the arms, and cut the controls to the candidates' FLOPs.

    Args:
        study: What is compared.
        tuning: The tuning runs of every recipe, by its name.

    Raises:
        ConfigError: Every baseline diverged.
    """
    task, margin = study.task, study.task.margin
    tuned = _choose_tuned(study.baseline, tuning, margin)
    for_tuned = _cheapest_equal(study.candidate, tuning, tuned, margin)
    for_default = _cheapest_equal(study.candidate, tuning, study.default, margin)
    tuned_fast = _cheapest_equal(study.baseline, tuning, study.default, margin)
    baseline_cost = add_usage([run.usage for r in study.baseline for run in tuning[r.name]])
    candidate_cost = add_usage([run.usage for r in study.candidate for run in tuning[r.name]])
    chosen = {
        "default": (study.default, Usage()),
        "tuned": (tuned, baseline_cost),
        "tuned-fast": (tuned_fast, baseline_cost),
        "candidate": (for_tuned, candidate_cost),
        "candidate-fast": (for_default, candidate_cost),
    }
    notes: list[str] = []
    share = _flops(tuning[for_tuned.name]) / _flops(tuning[tuned.name])
    if share < 1 - _LEAST_CUT:
        chosen["shorter"] = (task.shorter(tuned, share), baseline_cost)
        chosen["subset"] = (task.subset(tuned, share), baseline_cost)
    else:
        notes.append(
            f"no controls: the candidate {for_tuned.name} uses {share:.0%} of the tuned baseline's "
            "FLOPs, so there is nothing to cut"
        )
    share = _flops(tuning[for_default.name]) / _flops(tuning[study.default.name])
    if share < 1 - _LEAST_CUT:
        chosen["default-shorter"] = (task.shorter(study.default, share), Usage())
    return Choices(recipes=chosen, notes=notes)


def _flops(runs: Sequence[Trained]) -> int:
    return sum(run.usage.flops for run in runs)


def _cheapest_equal(
    recipes: Sequence[Recipe], tuning: Mapping[str, list[Trained]], reference: Recipe, margin: float
) -> Recipe:
    """Return the recipe of fewest FLOPs that is no worse than the reference, else the best.

    With one tuning seed there is no bound, and the mean alone decides.
    """
    theirs = tuning[reference.name]

    def passes(recipe: Recipe) -> bool:
        ours = tuning[recipe.name]
        pairs = [a.loss - b.loss for a, b in zip(ours, theirs, strict=True)]
        bound = upper_bound(pairs) if len(pairs) > 1 else margin
        return mean_loss(ours) <= mean_loss(theirs) < math.inf and bound <= margin

    good = [recipe for recipe in recipes if passes(recipe)]
    if not good:
        return min(recipes, key=lambda recipe: mean_loss(tuning[recipe.name]))
    return min(good, key=lambda recipe: _flops(tuning[recipe.name]))


def _choose_tuned(
    recipes: Sequence[Recipe], tuning: Mapping[str, list[Trained]], margin: float
) -> Recipe:
    best = min(mean_loss(tuning[r.name]) for r in recipes)
    if not math.isfinite(best):
        raise ConfigError(
            "every baseline diverged on the tuning seeds",
            hint="add recipes with a lower learning rate",
        )
    good = [r for r in recipes if mean_loss(tuning[r.name]) <= best + margin / 2]
    return min(good, key=lambda r: _flops(tuning[r.name]))
