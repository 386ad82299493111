"""`trainonce.fit` in a plain process: results, resuming, the guard, budgets and errors."""

import dataclasses
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import trainonce
from trainonce.clock import FakeClock
from trainonce.errors import BudgetSpentError, ConfigError, StateMismatchError
from trainonce.ledger import spending
from trainonce.ledger.spending import Budget
from trainonce.levers.fingerprint import model_digest
from trainonce.levers.noise_scale import NoiseScale
from trainonce.levers.plan_file import Plan

from .test_plan import Tokens, net, points, square, text, token_loss


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRAINONCE_PRECISION", "tf32")  # "auto" goes by timing


def quiet(_line):
    pass


def norm_net():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 1)
    )


@pytest.fixture(scope="module")
def made():
    """A plan for `norm_net` with many levers on, made once."""
    plan = trainonce.plan(norm_net(), points(), square, steps=60, eval=points(40))
    plan = plan.override("infobatch", on=True, num_epochs=9).override("precision", mode="bf16")
    return plan.override("early-stop", on=True, patience=50).override("freeze", on=True, window=3)


def fit(folder, plan, model=None, **options):
    model = model or norm_net()
    options = {"eval": points(40), "progress": quiet, **options}
    return model, trainonce.fit(
        model, points(), square, plan=plan, folder=folder, **options
    )  # fmt: skip


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


class Meteor(Exception):
    """Something that ends the process."""


def stop_after(updates, monkeypatch):
    """Make `fit` die in the update of that number or the next, as a killed process would."""
    from trainonce.levers.training import Training

    whole = Training.update

    def update(self, batch):
        if self.state.updates >= updates:
            raise Meteor
        return whole(self, batch)

    monkeypatch.setattr(Training, "update", update)


def test_it_trains_and_keeps_the_best_weights_as_safetensors(tmp_path):
    lines = []
    model, found = fit(tmp_path, None, net(), epochs=30, progress=lines.append)
    assert found.steps == found.plan.run.steps
    assert found.value < 0.2 < found.history[0][2]
    assert found.best == min(value for _, _, value in found.history)
    assert not found.stopped
    best = net()
    best.load_state_dict(load_file(found.weights))
    with torch.no_grad():
        x, y = points(40)
        loss = F.mse_loss(best(x), y).item()
    assert loss == pytest.approx(found.best, rel=1e-5)
    assert any("step 5" in line and "left" in line for line in lines)
    assert (tmp_path / "plan.toml").read_text().startswith("# A plan")
    assert math.isfinite(found.spent["max_hours"])
    assert next(model.parameters()).grad is None


@pytest.mark.parametrize("dies_at", [1, 17, 42])
def test_resumed_in_the_middle_it_ends_bit_identically(made, tmp_path, monkeypatch, dies_at):
    whole, result = fit(tmp_path / "whole", made)
    with monkeypatch.context() as patch:
        stop_after(dies_at, patch)
        with pytest.raises(Meteor):
            fit(tmp_path / "cut", made)
    resumed, again = fit(tmp_path / "cut", made)
    assert same(whole, resumed)
    assert [h[0] for h in again.history] == [h[0] for h in result.history]
    assert again.history == result.history
    assert again.steps == made.run.steps


def test_a_finished_run_is_not_trained_again(made, tmp_path, monkeypatch):
    model, first = fit(tmp_path, made)
    stop_after(0, monkeypatch)
    again, second = fit(tmp_path, made)
    assert same(model, again)
    assert second.history == first.history


def test_a_language_model_with_cut_sequences_resumes_too(tmp_path, monkeypatch):
    plan = trainonce.plan(Tokens(), text(), token_loss, steps=30)
    assert plan.is_on("sequence-warmup")
    results = []
    for folder, dies in (("whole", None), ("cut", 5)):
        model = Tokens()
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
        start = {k: v.clone() for k, v in model.state_dict().items()}
        if dies:
            with monkeypatch.context() as patch:
                stop_after(dies, patch)
                with pytest.raises(Meteor):
                    trainonce.fit(model, text(), token_loss, plan=plan, folder=tmp_path / folder,
                                  progress=quiet)  # fmt: skip
            model.load_state_dict(start)
        trainonce.fit(
            model, text(), token_loss, plan=plan, folder=tmp_path / folder, progress=quiet
        )
        results.append(model)
    assert same(*results)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(tmp_path):
    plan = trainonce.plan(net(), points(), square, steps=20)
    parts = dataclasses.replace(plan, run=dataclasses.replace(plan.run, micro_batch=5))
    one, _ = fit(tmp_path / "one", plan, net())
    other, _ = fit(tmp_path / "other", parts, net())
    assert not same(one, other)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_scalar_loss_trains_the_same_as_its_samples_and_says_what_is_off(tmp_path):
    lines = []
    plan = trainonce.plan(net(), points(), square, steps=20).override("precision", mode="tf32")
    scalar = trainonce.plan(net(), points(), lambda o, b: square(o, b).mean(), steps=20)
    scalar = scalar.override("precision", mode="tf32")
    one, _ = fit(tmp_path / "one", plan, net())
    other = net()
    trainonce.fit(
        other, points(), lambda o, b: square(o, b).mean(), plan=scalar, folder=tmp_path / "two",
        progress=lines.append,
    )  # fmt: skip
    assert same(one, other)
    assert any("scalar" in line for line in lines)
    forced = scalar.override("infobatch", on=True)
    with pytest.raises(ConfigError, match="InfoBatch is on in the plan"):
        trainonce.fit(net(), points(), lambda o, b: square(o, b).mean(), plan=forced,
                      folder=tmp_path / "three", progress=quiet)  # fmt: skip


def with_off_arm(plan, off_arm, step=10):
    probes = dataclasses.replace(plan.probes, off_arm=off_arm, guard_step=step)
    return dataclasses.replace(plan, probes=probes)


def test_the_guard_switches_reversible_levers_off_once_where_the_off_arm_was_better(made, tmp_path):
    lines = []
    plan = with_off_arm(made, [1e-6, 2e-6, 3e-6])
    _, found = fit(tmp_path, plan, progress=lines.append)
    assert found.guard.startswith("switch off")
    assert set(found.levers) == {"schedule", "early-stop"}  # precision, infobatch, freeze are off
    assert sum("guard:" in line for line in lines) == 1
    _, fine = fit(tmp_path / "fine", with_off_arm(made, [5.0, 6.0, 7.0]))
    assert fine.guard.startswith("fine")
    assert "infobatch" in fine.levers


def test_the_guard_only_reports_where_no_reversible_lever_is_on(tmp_path):
    plan = trainonce.plan(net(), points(), square, steps=30)
    for name in ("freeze", "infobatch", "sequence-warmup"):
        plan = plan.override(name, on=False)
    plan = with_off_arm(plan.override("precision", mode="tf32"), [1e-6, 2e-6])
    _, found = fit(tmp_path, plan, net())
    assert found.guard.startswith("report")
    assert "no reversible lever" in found.guard


def test_a_loss_that_is_not_finite_ends_the_run_once_no_lever_is_left_to_blame(made, tmp_path):
    def explodes(out, batch):
        return square(out, batch) * (math.nan if out.requires_grad else 1.0)

    lines, model = [], norm_net()
    found = trainonce.fit(
        model, points(), explodes, plan=made, folder=tmp_path, progress=lines.append
    )  # fmt: skip
    assert found.stopped.startswith("the loss is nan at step 6")  # the second look
    assert found.steps == 6
    assert sum("switched off: precision, infobatch, freeze" in line for line in lines) == 1
    assert found.best == math.inf


def test_a_run_that_the_guard_changed_resumes_as_it_went_on(made, tmp_path, monkeypatch):
    plan = with_off_arm(made, [1e-6, 2e-6, 3e-6])
    whole, _ = fit(tmp_path / "whole", plan)
    with monkeypatch.context() as patch:
        stop_after(31, patch)
        with pytest.raises(Meteor):
            fit(tmp_path / "cut", plan)
    resumed, found = fit(tmp_path / "cut", plan)
    assert same(whole, resumed)
    assert "infobatch" not in found.levers


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(spending, "SystemClock", lambda: fake)
    return fake


def test_a_budget_warns_once_stops_cleanly_and_goes_on_with_a_larger_one(made, tmp_path, clock):
    lines = []

    def slow(out, batch):
        clock.advance(36.0)  # 0.01 h an update, and a look costs some too
        return square(out, batch)

    def run(hours):
        model = norm_net()
        found = trainonce.fit(
            model, points(), slow, plan=made, folder=tmp_path / "cut", progress=lines.append,
            eval=points(40), metric=square, budget=Budget(max_hours=hours),
        )  # fmt: skip
        return model, found

    _, found = run(0.3)
    assert 20 < found.steps < 40
    assert "the budget is spent" in found.stopped
    assert sum(line.startswith("budget:") for line in lines) == 1
    with pytest.raises(BudgetSpentError, match="raise the limit|spent") as caught:
        run(0.3)
    assert caught.value.hint
    resumed, found = run(100.0)
    assert not found.stopped
    assert found.steps == made.run.steps
    assert found.spent["max_hours"] > 0.5  # what was used before counts
    whole, _ = fit(tmp_path / "whole", made)
    assert same(whole, resumed)


def test_money_and_energy_need_a_price_and_a_meter(made, tmp_path, monkeypatch):
    monkeypatch.setattr(spending, "open_meter", lambda *_: None)
    for budget in (Budget(max_cost_usd=1.0), Budget(max_kwh=1.0)):
        with pytest.raises(ConfigError, match="cannot be kept") as caught:
            fit(tmp_path, made, budget=budget)
        assert "settings.toml" in caught.value.hint


def test_a_plan_of_another_model_is_refused(made, tmp_path):
    with pytest.raises(ConfigError, match="another model"):
        fit(tmp_path, made, net())
    assert model_digest(net()) != made.fingerprint.model


def test_a_plan_for_more_data_than_there_are_is_refused(made, tmp_path):
    few = tuple(each[:4] for each in points())
    with pytest.raises(ConfigError, match="there are 4 to train on") as caught:
        trainonce.fit(norm_net(), few, square, plan=made, folder=tmp_path, progress=quiet)
    assert "batch_size" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("plan", 5, "plan is 5"),
        ("budget", {"max_hours": 1}, "budget is"),
        ("optimizer", torch.optim.SGD, "optimizer is"),
        ("optimizer", torch.optim.SGD([torch.zeros(1, requires_grad=True)]), "none of the model's"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_a_hint(name, given, words):
    with pytest.raises(ConfigError, match=words) as caught:
        trainonce.fit(norm_net(), points(), square, **{name: given})
    assert caught.value.hint
    with pytest.raises(ConfigError, match="model is 3"):
        trainonce.fit(3, points(), square)


def test_runs_that_begin_in_the_same_second_do_not_go_on_from_one_another(made):
    results = [
        trainonce.fit(norm_net(), points(), square, plan=made, seed=seed, progress=quiet)
        for seed in range(3)
    ]
    assert len({result.folder for result in results}) == 3
    assert len({result.loss for result in results}) == 3


def test_state_of_another_run_is_refused(made, tmp_path):
    fit(tmp_path, made)
    other = made.override("freeze", on=False)
    with pytest.raises((ConfigError, StateMismatchError)):
        fit(tmp_path, dataclasses.replace(other, run=dataclasses.replace(other.run, steps=99)))


def test_settings_that_a_lever_does_not_know_are_refused(made, tmp_path):
    with pytest.raises(ConfigError, match="does not know"):
        fit(tmp_path, made.override("schedule", wormup=0.3))


def test_early_stop_ends_the_run_with_its_reason(made, tmp_path):
    plan = made.override("early-stop", patience=1, min_delta=100.0).override("schedule", warmup=0.0)
    _, found = fit(tmp_path, plan)
    assert found.steps < plan.run.steps
    assert "no gain" in found.stopped
    model, again = fit(tmp_path, plan)
    assert (again.steps, again.history) == (found.steps, found.history)  # over is over


def test_a_plan_file_that_does_not_exist_is_made_and_one_that_does_is_followed(tmp_path):
    path = tmp_path / "my.toml"
    _, first = fit(tmp_path / "one", path, net(), steps=20)
    assert isinstance(first.plan, Plan)
    path.write_text(path.read_text().replace("steps = 20", "steps = 22", 1))
    lines = []
    _, second = fit(tmp_path / "two", path, net(), steps=20, progress=lines.append)
    assert second.steps == 22
    assert any("steps=20 is not used" in line for line in lines)


def test_the_callers_optimizer_is_used(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    _, found = fit(tmp_path, None, model, steps=40, optimizer=optimizer)
    assert found.steps == 40
    assert optimizer.param_groups[0]["lr"] < 0.05  # decayed towards zero


def test_tensorboard_is_asked_for_with_a_hint_where_it_is_missing(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed") as caught:
        fit(tmp_path, made, tensorboard=tmp_path / "tb")
    assert "pip install" in caught.value.hint


def test_tensorboard_gets_what_is_shown(made, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, log_dir):
            written.append(log_dir)

        def add_scalar(self, name, value, step):
            written.append((name, step, value))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    _, found = fit(tmp_path, made, tensorboard=tmp_path / "tb")
    assert written[0] == str(tmp_path / "tb")
    assert written[-1] == "closed"
    values = {(name, step): value for name, step, value in written[1:-1]}
    for step, loss, value in found.history:
        assert values["loss/train", step] == loss
        assert values["eval", step] == value


def num_updates(fit_once):
    """Count the calls of any optimizer's step while `fit_once` runs."""
    count = []
    hook = register_optimizer_step_post_hook(
        lambda *_: count.append(1)
    )  # fmt: skip
    try:
        fit_once()
    finally:
        hook.remove()
    return len(count)


@pytest.mark.parametrize("dies_at", [5, 16, 33])
def test_the_noise_scale_joins_batches_to_one_update_and_resumes(
    made, tmp_path, monkeypatch, dies_at
):
    plan = made.override("noise-scale", on=True, every=4, most=4, smoothing=0.5)
    model, found = fit(tmp_path / "whole", plan)
    assert found.steps == plan.run.steps
    assert found.history[-1][0] == plan.run.steps
    with monkeypatch.context() as patch:
        stop_after(dies_at, patch)
        with pytest.raises(Meteor):
            fit(tmp_path / "cut", plan)
    resumed, again = fit(tmp_path / "cut", plan)
    assert same(model, resumed)
    assert again.history == found.history
    updates = num_updates(lambda: fit(tmp_path / "counted", plan))
    assert plan.run.steps / 4 < updates < plan.run.steps
    off = num_updates(lambda: fit(tmp_path / "off", made))
    assert off == made.run.steps


def test_joined_batches_give_the_gradient_of_one_batch_that_holds_them(tmp_path, monkeypatch):
    """Two batches of 24 samples, and one of the same 48, before the only update."""
    monkeypatch.setattr(NoiseScale, "num_batches", 2, raising=False)
    monkeypatch.setattr(NoiseScale, "__setattr__", ignore("num_batches"))
    x, y = points(48)
    plan = trainonce.plan(net(), (x, y), square, steps=2).override("schedule", on=False)
    plan = plan.override("precision", mode="tf32").override("optimizer", on=False)
    found = []
    for batch_size, steps, joined in ((24, 2, True), (48, 1, False)):
        run = dataclasses.replace(
            plan.run, batch_size=batch_size, micro_batch=batch_size, steps=steps, lr=0.01
        )
        model, gradients = net(), []
        hook = register_optimizer_step_pre_hook(
            lambda *_, model=model, kept=gradients: kept.append(
                [p.grad for p in model.parameters()]
            )
        )
        trainonce.fit(
            model, (x, y), square, folder=tmp_path / str(steps), progress=quiet,
            plan=dataclasses.replace(plan, run=run).override("noise-scale", on=joined),
        )  # fmt: skip
        hook.remove()
        (only,) = gradients
        found.append(only)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def ignore(name):
    """Return a __setattr__ that leaves one attribute as it is."""

    def setattr_(self, key, value):
        if key != name:
            object.__setattr__(self, key, value)

    return setattr_


def test_early_stop_without_data_is_told_and_a_metric_that_is_no_tensor_is_refused(made, tmp_path):
    lines = []
    fit(tmp_path / "one", made, eval=None, progress=lines.append)
    assert any("no data to evaluate on" in line for line in lines)
    with pytest.raises(ConfigError, match="returned float"):
        fit(tmp_path, made, metric=lambda _out, _batch: 3.0)


@pytest.mark.parametrize("settings", [{}, {"share": 0.9}, {"share": 1.0}])
def test_recomputed_activations_change_no_bit_and_leave_the_model_as_it_was(
    made, tmp_path, settings
):
    plan = made.override("recompute", on=True, **settings)
    (plain, one), (model, other) = fit(tmp_path / "one", made), fit(tmp_path / "two", plan)
    assert same(plain, model)  # batch norms count a batch once
    assert one.history == other.history
    assert all("forward" not in vars(block) for block in model.modules())
    broken = norm_net()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "three", plan, broken, metric=lambda _out, _batch: 1 / 0)
    assert all("forward" not in vars(block) for block in broken.modules())


def test_a_plan_with_quantized_training_says_why_it_cannot_be_here(made, tmp_path):
    plan = made.override("quantized", on=True, dtype="int8")
    with pytest.raises(ConfigError, match="int8 training is not possible here"):
        fit(tmp_path, plan)
    with pytest.raises(ConfigError, match="does not know"):
        fit(tmp_path, made.override("recompute", on=True, portion=0.3))
