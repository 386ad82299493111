"""The harness on tasks whose truth is known."""

import json
import math

import pytest
import torch

from trainonce.errors import ConfigError, StudyPausedError
from trainonce.levers import results, tables
from trainonce.levers.compare import Trained, compare, savings, upper_bound
from trainonce.levers.harness import Recipe, Study, run_study, saved_with_tuning
from trainonce.levers.journal import Journal
from trainonce.levers.usage import Usage


class Known:
    """Loss is `bias + 1/steps + noise(seed)`, so every choice can be foretold."""

    name, metric, margin = "known", "loss", 0.02

    def __init__(self):
        self.trained = []

    def settings(self):
        return {}

    def train(self, recipe, seed, split, meter):
        self.trained.append((recipe["id"], seed, split))
        x = torch.ones(4, 4)
        with meter.running():
            for _ in range(recipe["steps"]):
                meter.step("mm", lambda: x @ x, samples=1)
        noise = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() / 10
        return {"loss": recipe.get("bias", 0) + 1 / recipe["steps"] + noise}

    def shorter(self, recipe, share):
        steps = round(recipe.settings["steps"] * share)
        name = f"{recipe.name}, shorter"
        return Recipe(name, {**recipe.settings, "id": name, "steps": steps})

    def subset(self, recipe, share):
        settings = {**self.shorter(recipe, share).settings, "id": "subset", "bias": 0.5}
        return Recipe("subset", settings)


def recipe(name, steps, bias=0.0):
    return Recipe(name, {"id": name, "steps": steps, "bias": bias})


def study(task, **changes):
    arguments = {
        "default": recipe("default", 100, 0.1),
        "baseline": [recipe("b50", 50), recipe("b200", 200), recipe("b400", 400)],
        "candidate": [recipe("c10", 10, -0.1), recipe("c20", 20, -0.1), recipe("c40", 40, -0.05)],
        "tuning_seeds": (7, 8),
        **changes,
    }
    return Study(task=task, **arguments)


@pytest.fixture(scope="module")
def found():
    return run_study(study(Known()))


def test_the_tuned_baseline_is_the_cheapest_within_half_the_margin_of_the_best(found):
    assert found.arms["tuned"].recipe.name == "b200"  # 0.005 against 0.0025 at twice the price


def test_candidates_are_the_cheapest_that_match_each_reference(found):
    assert found.arms["candidate"].recipe.name == "c10"
    assert found.arms["candidate"].against_tuned.saved["flops"] == pytest.approx(1 - 10 / 200)
    assert found.arms["candidate"].against_default.saved["flops"] == pytest.approx(1 - 10 / 100)
    assert found.arms["candidate-fast"].recipe.name == "c10"


def test_equal_quality_is_decided_by_the_paired_difference_and_not_by_the_seed_noise(found):
    comparison = found.arms["candidate"].against_tuned
    assert comparison.mean_difference == pytest.approx(-0.1 + 1 / 10 - 1 / 200)
    assert comparison.upper_bound == pytest.approx(comparison.mean_difference)
    assert comparison.equal


def test_controls_get_the_candidates_compute_and_are_judged_alike(found):
    for role in ("shorter", "subset"):
        assert found.arms[role].runs[0].usage.flops == found.arms["candidate"].runs[0].usage.flops
        assert not found.arms[role].against_tuned.equal


def test_the_default_is_also_cut_to_the_compute_of_the_candidate_that_should_match_it(found):
    control, candidate = found.arms["default-shorter"], found.arms["candidate-fast"]
    assert control.runs[0].usage.flops == candidate.runs[0].usage.flops
    assert not control.against_default.equal


def test_choices_see_only_tuning_seeds_and_the_tuning_split():
    task = Known()
    run_study(study(task))
    by_split = {
        s: {seed for _, seed, split in task.trained if split == s} for _, _, s in task.trained
    }
    assert by_split == {"tuning": {7, 8}, "reporting": {0, 1, 2, 3, 4}}
    assert len(task.trained) == len(set(task.trained))  # nothing is trained twice


def test_a_candidate_that_saves_nothing_is_reported_without_controls():
    result = run_study(study(Known(), candidate=[recipe("same", 200)]))
    assert "subset" not in result.arms
    assert "nothing to cut" in result.notes[0]


def test_tuning_is_paid_once_and_runs_as_often_as_they_are_repeated(found):
    reference, arm = found.arms["tuned"], found.arms["candidate"]
    tuning = {"tuned": 2 * (50 + 200 + 400), "candidate": 2 * (10 + 20 + 40)}
    for reruns in (1, 10):
        costs = [tuning["tuned"] + reruns * 200, tuning["candidate"] + reruns * 10]
        assert saved_with_tuning(reference, arm, reruns) == pytest.approx(1 - costs[1] / costs[0])
    default = found.arms["default"]
    expected = 1 - (tuning["candidate"] + 10) / 100
    assert saved_with_tuning(default, arm, 1) == pytest.approx(expected)
    assert expected < 0  # one run does not pay for its tuning, and that is shown
    assert saved_with_tuning(reference, arm, 1, "energy_j") is None


def test_a_diverged_run_is_never_of_equal_quality():
    usage = Usage(flops=1)
    good = [Trained(seed=s, loss=1.0, metrics={}, usage=usage) for s in range(5)]
    bad = [
        Trained(seed=s, loss=math.nan if s == 3 else 0.0, metrics={}, usage=usage) for s in range(5)
    ]
    assert not compare(good, bad, 10.0).equal
    assert json.loads(json.dumps(compare(good, bad, 10.0).to_record(), allow_nan=False))


def test_a_baseline_that_always_diverges_is_an_error_and_not_a_saving():
    with pytest.raises(ConfigError, match="diverged"):
        run_study(study(Known(), baseline=[recipe("nan", 5, math.nan)]))


def test_the_upper_bound_is_students():
    # Mean 3, sample variance 2.5, t(0.95, 4) = 2.131847 from tables.
    assert upper_bound([1, 2, 3, 4, 5]) == pytest.approx(3 + 2.131847 * (2.5 / 5) ** 0.5, abs=1e-5)
    assert upper_bound([1.0]) == math.inf


def test_comparing_unpaired_or_too_few_seeds_is_refused():
    runs = [Trained(seed=s, loss=0.0, metrics={}, usage=Usage()) for s in range(6)]
    with pytest.raises(ConfigError, match="different seeds"):
        compare(runs[:5], runs[1:], 0.1)
    with pytest.raises(ConfigError, match="too few"):
        compare(runs[:4], runs[:4], 0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuning_seeds": (4, 5)}, "for tuning and for reporting"),
        ({"reporting_seeds": (0, 1, 2, 3)}, "too few"),
        ({"reporting_seeds": (0, 0, 0, 0, 0)}, "too few"),
        ({"candidate": []}, "baselines and candidates"),
        ({"candidate": [recipe("b50", 3)]}, "a name of its own"),
    ],
)
def test_studies_that_would_mislead_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        study(Known(), **changes)


def test_savings_need_both_sides_measured():
    measured, not_measured = Usage(flops=4, energy_j=2.0), Usage(flops=1)
    assert savings([measured], [not_measured]) == {"flops": 0.75}


def test_a_result_file_is_complete_and_tables_and_plots_come_from_it(found, tmp_path):
    record = results.to_record(found, {"task": ["known"]})
    path = results.write(record, tmp_path, "2-core-cpu")
    read = results.read(path)
    assert read == json.loads(json.dumps(record))
    assert path.name.endswith("_known.json")
    assert set(read["recipes"]) == {"default", "b50", "b200", "b400", "c10", "c20", "c40"}
    assert len(read["tuning"]["b50"]) == 2
    page = tables.page(read)
    assert "| tuned baseline | b200 |" in page
    assert "95%" in page
    assert "| control: tuned, random subset |" in page
    summary = tables.summary_table([read, read])
    assert summary.count("| known, medium | levers, to the tuned baseline's quality | c10 |") == 2
    assert "| yes / yes | 90% / 95% |" in summary
    tables.plot(read, tmp_path / "known.png")
    assert (tmp_path / "known.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="no result of format"):
        results.read(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        results.read(tmp_path / "missing.json")


def test_a_paused_study_goes_on_from_its_journal_and_trains_nothing_twice(tmp_path, found):
    path, tasks = tmp_path / "journal.jsonl", []
    for allowed in (3, 7, 1000):
        task = Known()
        tasks.append(task)
        asked = iter(range(allowed))
        arguments = {"journal": Journal(path), "pause": lambda left=asked: next(left, None) is None}
        if allowed < 1000:
            with pytest.raises(StudyPausedError):
                run_study(study(task), **arguments)
            with path.open("a") as file:
                file.write('{"key": "cut sho')  # as if it had died while it wrote
        else:
            resumed = run_study(study(task), **arguments)
    trained = [each for task in tasks for each in task.trained]
    assert [len(task.trained) for task in tasks[:2]] == [3, 7]
    assert len(trained) == len(set(trained))
    for role, arm in found.arms.items():
        assert resumed.arms[role].recipe == arm.recipe
        assert [run.loss for run in resumed.arms[role].runs] == [run.loss for run in arm.runs]


def test_a_journal_does_not_answer_for_another_recipe_seed_or_split(tmp_path):
    journal, task = Journal(tmp_path / "j"), Known()
    usage = Usage(flops=3)

    def get(recipe_settings, seed, split, loss):
        wanted = Recipe("any name", recipe_settings)
        run = Trained(seed=seed, loss=loss, metrics={"loss": loss}, usage=usage)
        return journal.get_or_train(task, wanted, seed, split, lambda: run).loss

    assert get({"a": 1}, 0, "tuning", 1.0) == 1.0
    assert get({"a": 1}, 0, "tuning", 2.0) == 1.0
    assert get({"a": 2}, 0, "tuning", 3.0) == 3.0
    assert get({"a": 1}, 1, "tuning", 4.0) == 4.0
    assert get({"a": 1}, 0, "reporting", math.inf) == math.inf
    again = Journal(tmp_path / "j")
    assert len(again) == 4
    assert again.get_or_train(task, Recipe("r", {"a": 1}), 0, "reporting", pytest.fail).loss == (
        math.inf
    )


def test_what_tuning_alone_saves_is_an_arm_of_its_own(found):
    assert found.arms["tuned-fast"].recipe.name == "b50"
    assert found.arms["tuned-fast"].against_default.saved["flops"] == pytest.approx(0.5)
