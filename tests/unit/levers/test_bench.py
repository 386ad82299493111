"""The tasks of `trainonce bench levers`, and the command."""

import json
import sys

import pytest
import torch

from trainonce.cli.main import main
from trainonce.errors import ConfigError
from trainonce.levers import results
from trainonce.levers.bench import GRIDS, SIZES, TASKS, make_study
from trainonce.levers.bench.control import recipe as ppo
from trainonce.levers.bench.digits import Digits
from trainonce.levers.bench.finetune import Finetune
from trainonce.levers.bench.stdlib_bytes import StdlibBytes
from trainonce.levers.harness import Recipe, Study, run_study
from trainonce.levers.usage import UsageMeter


def train(task, settings, seed=0, split="reporting"):
    meter = UsageMeter()
    return task.train(settings, seed, split, meter), meter.total()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_recipe_of_a_study_is_one_that_the_task_understands(name, grid):
    study = make_study(name, grid=grid)
    recipes = (study.default, *study.baseline, *study.candidate)
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    assert all(recipe.settings.keys() == study.default.settings.keys() for recipe in recipes)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0.2},
        {"epochs": 0.2, "optimizer": "muon", "schedule": True, "subset": 0.5},
        {"epochs": 1.3, "optimizer": "adamw", "infobatch": 0.5, "batch": 250},
    ],
)
def test_digits_trains_the_same_twice_and_differently_by_seed(settings):
    task = Digits(width=2)
    (first, usage), (again, _) = train(task, settings), train(task, settings)
    assert first == again != train(task, settings, seed=1)[0]
    assert usage.flops > 0
    assert usage.samples == usage.steps * settings.get("batch", 64)


@pytest.mark.parametrize(
    "settings",
    [{"tokens": 64}, {"tokens": 96, "optimizer": "muon", "schedule": True, "sequence_warmup": 0.9}],
)
def test_bytes_trains_the_same_twice_and_counts_its_tokens(settings):
    task = StdlibBytes(dim=8, layers=1, context=16)
    settings = {**settings, "batch": 2}
    (first, usage), (again, _) = train(task, settings), train(task, settings)
    assert first == again
    assert usage.tokens == settings["tokens"]
    assert 0 < first["bits_per_byte"] < 9


@pytest.mark.parametrize("settings", [{}, {"freeze": 0.99}, {"prefix": 2}])
def test_fine_tuning_starts_from_the_same_network_and_skips_what_is_frozen(settings):
    task = Finetune(width=2)
    settings = {"epochs": 3, "optimizer": "adamw", "lr": 0.01, "schedule": True, **settings}
    (first, usage), (again, _) = train(task, settings), train(task, settings)
    assert first == again
    whole = train(task, {**settings, "freeze": 0.0, "prefix": 0})[1]
    if settings.keys() & {"freeze", "prefix"}:
        assert 0 < usage.flops < whole.flops
    else:
        assert usage.flops == whole.flops


@pytest.mark.parametrize("name", ["cartpole", "acrobot"])
def test_an_agent_trains_the_same_twice_and_differently_by_seed(name):
    study = make_study(name, size="small")
    settings = {**study.default.settings, "steps": 2048, "epochs": 1}
    (first, usage), (again, _) = train(study.task, settings), train(study.task, settings)
    assert first == again
    other = train(study.task, settings, seed=1)[0]
    assert first != other or name == "acrobot"  # which has not swung up once by then
    assert first["env_steps"] == usage.samples == 2048
    assert first["negative_return"] == -first["return"]
    half = train(study.task, {**settings, "share": 0.5})[1]
    assert 0.5 * usage.flops < half.flops < 0.8 * usage.flops  # acting is not halved


def test_an_agent_stops_once_its_returns_hold_the_target():
    task = make_study("cartpole", size="small").task
    recipe = ppo(steps=20_000, epochs=1, stop_at=12.0, window=5)
    found, usage = train(task, recipe.settings)
    assert found["env_steps"] == usage.samples < 2_000
    assert recipe.name == "ppo 0.001, 1 epochs, 20k steps, until 12 over 5"
    never = ppo(steps=2_048, epochs=1, stop_at=501.0, window=5)
    assert train(task, never.settings)[0]["env_steps"] == 2_048


def test_a_policy_that_seems_good_is_tried_at_rest_before_training_stops():
    task = make_study("cartpole", size="small").task
    at_once = {"steps": 20_000, "epochs": 4, "stop_at": 12.0, "window": 8}
    _, believed = train(task, ppo(**at_once).settings)
    found, verified = train(task, ppo(**at_once, verify=1).settings)
    assert found["env_steps"] < 20_000
    assert verified.samples > believed.samples
    # What it took longer was acting alone, which is cheap beside four passes of training.
    one = train(task, ppo(steps=256, epochs=4).settings)[1].flops
    assert 0 < verified.flops - believed.flops < 0.1 * one * verified.samples / 256


def test_gymnasium_that_is_missing_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match="gymnasium is not installed") as caught:
        make_study("cartpole")
    assert "pip install" in caught.value.hint


def test_sizes_double_the_width_and_belong_to_the_file_name(tmp_path):
    widths = [make_study("digits", size=size).task.settings()["width"] for size in SIZES]
    assert widths == [4, 8, 16]
    with pytest.raises(ConfigError, match="size 'huge'"):
        make_study("digits", size="huge")


def test_data_for_training_tuning_and_reporting_are_disjoint():
    task = Digits(split_seed=3)
    parts = [task._train[0], *(images for images, _ in task._splits.values())]
    assert [len(part) for part in parts] == [1000, 398, 399]
    images = torch.cat(parts).flatten(1)
    whole = torch.cat([Digits()._train[0], *(x for x, _ in Digits()._splits.values())]).flatten(1)
    assert torch.equal(images.sort(0).values, whole.sort(0).values)
    other = StdlibBytes()
    ends = [len(other._train), *(len(part) for part in other._splits.values())]
    assert sum(ends) <= 3_000_000
    assert ends[1:] == [150_000, 150_000]


def test_controls_have_the_share_of_updates_that_was_asked_for():
    task, recipe = Digits(width=2), Recipe("r", {"epochs": 4, "batch": 100})
    for control in (task.shorter(recipe, 0.2), task.subset(recipe, 0.2)):
        assert control.name != recipe.name
        assert train(task, control.settings)[1].steps == 8
    text, tokens = (
        StdlibBytes(dim=8, layers=1, context=16),
        Recipe("r", {"tokens": 640, "batch": 2}),
    )
    for control in (text.shorter(tokens, 0.5), text.subset(tokens, 0.5)):
        assert train(text, control.settings)[1].tokens == 320


def test_the_command_shows_a_result_file_without_running_anything(tmp_path, capsys):
    tiny = {"epochs": 0.1, "lr": 0.01}
    study = Study(
        task=Digits(width=1),
        default=Recipe("d", tiny),
        baseline=[Recipe("b", tiny)],
        candidate=[Recipe("c", {**tiny, "optimizer": "muon"})],
        tuning_seeds=(9,),
    )
    path = results.write(results.to_record(run_study(study), {"task": ["digits"]}), tmp_path, "x")
    assert main(["bench", "levers", "--show", str(path)]) == 0
    assert "| tuned baseline | b |" in capsys.readouterr().out
    assert main(["bench", "levers", "--show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["task"]["name"] == "digits"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "magic"], "no task 'magic'"),
        (["--task", "digits", "--grid", "huge"], "grid 'huge'"),
        (["--task", "digits", "--seeds", "4"], "too few"),
        (["--tuning-seeds", "0"], "at least 1"),
        (["--task", "digits", "--size", "huge"], "size 'huge'"),
        (["--pause-after-s", "5"], "--journal"),
    ],
)
def test_bad_options_are_refused_with_a_hint_before_anything_runs(arguments, words, capsys):
    assert main(["bench", "levers", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_command_pauses_with_a_code_of_its_own(tmp_path, capsys):
    arguments = ["--task", "digits", "--grid", "small", "--journal", str(tmp_path / "j")]
    assert main(["bench", "levers", *arguments, "--pause-after-s", "0"]) == 75
    assert "goes on from here" in capsys.readouterr().err


def test_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match="no task"):
        make_study("magic")
