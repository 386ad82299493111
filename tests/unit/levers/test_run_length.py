"""How long a planned run is, and in which batches."""

import pytest

from trainonce.errors import ConfigError
from trainonce.ledger.spending import Budget
from trainonce.levers.batches import Data
from trainonce.levers.fingerprint import Fingerprint
from trainonce.levers.plan_file import LeverPlan
from trainonce.levers.run_length import (
    RunLength,
    asked_length,
    choose_batch_size,
    within_budget,
    without_pruned,
)

LENGTH = RunLength(1000, "asked for")


def data(samples, batch_size=None):
    return Data(dataset=range(samples), batch_size=batch_size)


def fingerprint(task="vision", pretrained=False):
    return Fingerprint(
        model="0" * 16, num_parameters=1, task=task, pretrained=pretrained, per_sample=True,
        num_samples=320, batch_shapes=[], sequence_length=0, learned_positions=False,
        device="cpu", world_size=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "asked", "ranks", "size", "words"),
    [
        (1000, None, 1, 32, "nobody gave"),
        (64, None, 1, 4, "nobody gave"),
        (1000, 50, 2, 50, "the loader's"),
        (1000, 50, 4, 48, "48 to fit data and ranks"),
        (10, 50, 4, 8, "8 to fit data and ranks"),
        (1000, 2, 4, 4, "4 to fit data and ranks"),
    ],
)
def test_a_batch_fits_the_data_and_is_shared_by_the_ranks(samples, asked, ranks, size, words):
    found, why = choose_batch_size(data(samples, asked), ranks)
    assert found == size
    assert words in why


@pytest.mark.parametrize(
    ("kind", "steps", "epochs", "expected"),
    [
        ({}, 7, None, 7),
        ({}, None, 0.01, 1),
        ({}, None, 2.5, 25),
        ({}, None, None, 100),
        ({"pretrained": True}, None, None, 30),
        ({"task": "language-model"}, None, None, 10),
    ],
)
def test_a_length_is_the_callers_or_that_of_the_task(kind, steps, epochs, expected):
    found = asked_length(data(320), 32, fingerprint(**kind), steps, epochs)
    assert found.steps == expected
    assert ("nobody gave a length" in found.why) == (steps is None and epochs is None)


def test_hours_and_money_cut_a_run_to_what_the_tighter_of_them_allows(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path))
    (tmp_path / "settings.toml").write_text("[economics]\nusd_per_gpu_hour = 2.0\n")
    # Of 3600 updates an hour, a tenth of the time is for other things.
    assert within_budget(Budget(max_hours=1), LENGTH, 1.0, 1) is LENGTH
    assert within_budget(Budget(max_hours=0.1), LENGTH, 1.0, 1).steps == 324
    money = Budget(max_hours=1, max_cost_usd=0.4)
    assert within_budget(money, LENGTH, 1.0, 1).steps == 648
    assert within_budget(money, LENGTH, 1.0, 2).steps == 324
    assert within_budget(Budget(max_kwh=1), LENGTH, 1.0, 1) is LENGTH
    with pytest.raises(ConfigError, match="one update takes 5e"):
        within_budget(money, LENGTH, 5000.0, 1)


def test_updates_that_infobatch_leaves_out_are_not_planned():
    def levers(on):
        settings = {"num_epochs": 10, "ratio": 0.5, "anneal": 0.875}
        one = LeverPlan(on=on, why="", expected="", reversible=True, settings=settings)
        return {"infobatch": one}

    assert without_pruned(LENGTH, levers(on=False)) is LENGTH
    pruned = without_pruned(LENGTH, levers(on=True))
    assert pruned.steps == 748
    assert "InfoBatch needs about 75% of 1000 updates" in pruned.why
