"""Sweeps: shared prefixes are trained once, and every trial ends as if it were trained alone."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import trainonce as once
from trainonce.errors import ConfigError, NodeError, StateMismatchError
from trainonce.graph.digest import digest
from trainonce.graph.sweeps.state import capture, restore

STEPS = []  # every step that was really trained


class Order:
    """Batches in an order of its own, which goes on where it was."""

    def __init__(self, size, batch):
        self.generator = torch.Generator().manual_seed(3)
        self.size, self.batch, self.left = size, batch, []

    def take(self):
        if len(self.left) < self.batch:
            self.left = torch.randperm(self.size, generator=self.generator).tolist()
        chosen, self.left = self.left[: self.batch], self.left[self.batch :]
        return chosen

    def state_dict(self):
        return {"generator": self.generator.get_state(), "left": self.left}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.left = list(state["left"])


def build(hyper, images):
    torch.manual_seed(hyper.get("seed", 0))
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9)
    return {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "images": images,
        "order": Order(len(images), 8), "noise": np.random.default_rng(1), "average": 0.0,
    }  # fmt: skip


def step(objects, hyper, index):
    STEPS.append(index)
    chosen = objects["order"].take()
    x = objects["images"][chosen] + 0.1 * torch.randn(1) + random.random()
    x = x + float(objects["noise"].normal()) + float(np.random.random())
    target = objects["images"][chosen].sum(1).long() % 3
    objects["optimizer"].zero_grad()  # gradients are left over from the step before
    loss = nn.functional.cross_entropy(objects["model"](x), target)
    loss.backward()
    for group in objects["optimizer"].param_groups:
        group["lr"] = hyper["lr"]
    objects["optimizer"].step()
    objects["scheduler"].step()
    objects["average"] = 0.9 * objects["average"] + 0.1 * loss.item()


def evaluate(objects):
    objects["model"].eval()
    with torch.no_grad():
        return float(objects["model"](objects["images"]).square().sum())


IMAGES = torch.linspace(-1, 1, 32 * 6).view(32, 6)


@pytest.fixture
def segment():
    STEPS.clear()
    return once.Segment(build, step, evaluate=evaluate, inputs={"images": IMAGES})


def late_decays(segment, num_steps=20):
    return [segment.trial(num_steps, lr={0: 0.1, at: 0.01}) for at in (12, 14, 16, 18)]


def test_shared_prefixes_are_trained_once_and_each_trial_ends_as_if_trained_alone(
    segment, tmp_path
):
    trials = late_decays(segment)
    before = torch.get_rng_state()
    report = once.sweep(trials, store=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(STEPS) == report.steps_computed == report.steps_tree == 18 + 8 + 6 + 4 + 2
    assert (report.steps_alone, report.reached) == (80, 1.0)
    assert "80 steps together; their tree has 38 (2.11x less)" in str(report)
    assert "100.0 % of the bound" in str(report)
    for trial, result in zip(trials, report.results, strict=True):
        state, value = segment.run(trial)
        assert result.value == value
        assert digest(result.state()) == digest(state)


def test_the_same_sweep_again_computes_nothing(segment, tmp_path):
    first = once.sweep(late_decays(segment), store=tmp_path)
    STEPS.clear()
    again = once.sweep(late_decays(segment), store=tmp_path)
    assert STEPS == []
    assert (again.steps_needed, again.steps_computed) == (0, 0)
    assert [r.value for r in again.results] == [r.value for r in first.results]


def test_a_longer_run_trains_only_what_is_new(segment, tmp_path):
    trial = segment.trial(20, lr=0.1)
    once.sweep([trial.until(10)], store=tmp_path)
    STEPS.clear()
    report = once.sweep([trial], store=tmp_path)
    assert list(range(10, 20)) == STEPS
    assert digest(report.results[0].state()) == digest(segment.run(trial)[0])


def test_a_later_sweep_goes_on_from_states_that_are_no_stage_of_its_own(segment, tmp_path):
    once.sweep([segment.trial(13, lr=0.1)], store=tmp_path)
    STEPS.clear()
    trials = [segment.trial(20, lr={0: 0.1, at: 0.01}) for at in (5, 14, 16)]
    report = once.sweep(trials, store=tmp_path)
    # The first needs the trunk up to 5; the others go on from 13.
    assert sorted(STEPS) == sorted([*range(20), 13, 14, 15, *range(14, 20), *range(16, 20)])
    assert report.results[2].value == segment.run(trials[2])[1]


def test_trials_that_come_one_by_one_share_the_trunk_where_schedules_change(segment, tmp_path):
    once.sweep([segment.trial(10, lr={0: 0.1, 6: 0.01})], store=tmp_path)
    STEPS.clear()
    once.sweep([segment.trial(10, lr={0: 0.1, 6: 0.02})], store=tmp_path)
    once.sweep([segment.trial(10, lr={0: 0.1, 8: 0.01})], store=tmp_path)
    assert STEPS == [6, 7, 8, 9, 6, 7, 8, 9]


def test_schedules_share_by_their_values_however_they_are_written(segment, tmp_path):
    trials = [
        segment.trial(6, lr=0.1),
        segment.trial(6, lr=lambda step: 0.1),
        segment.trial(6, lr=[0.1] * 6),
        segment.trial(6, lr={0: 0.1}),
        segment.trial(6, lr=lambda step: 0.1 if step < 5 else 0.2),
    ]
    report = once.sweep(trials, store=tmp_path)
    assert report.steps_tree == 7
    cosine = [
        segment.trial(end, lr=lambda step, end=end: np.cos(step / end).item()) for end in (6, 8)
    ]
    assert once.sweep(cosine, store=tmp_path).steps_tree == 6 + 8 - 1  # the first step is equal


def test_an_edit_of_the_step_or_other_inputs_share_nothing(segment, tmp_path):
    once.sweep([segment.trial(4, lr=0.1)], store=tmp_path)

    def edited(objects, hyper, index):
        step(objects, hyper, index)
        objects["average"] += 1

    for other in (
        once.Segment(build, edited, evaluate=evaluate, inputs={"images": IMAGES}),
        once.Segment(build, step, evaluate=evaluate, inputs={"images": IMAGES + 1}),
    ):
        assert once.sweep([other.trial(4, lr=0.1)], store=tmp_path).steps_computed == 4


def edited(number):
    """Return functions of one name and place whose code differs by what they hold."""

    def build(hyper):
        return {"count": number if hyper["what"] == "build" else 0}

    def step(objects, hyper, index):
        objects["count"] += number if hyper["what"] == "step" else 1

    def judge(objects):
        return objects["count"] * (number if objects["count"] < 0 else 1)

    return once.Segment(build, step, evaluate=judge)


@pytest.mark.parametrize("what", ["build", "step"])
def test_an_edit_of_what_is_built_or_done_is_never_a_stale_hit(what, tmp_path):
    for number in (5, 7):
        trial = edited(number).trial(3, what=what)
        (result,) = once.sweep([trial], store=tmp_path).results
        assert result.value == {"build": number + 3, "step": 3 * number}[what]


def test_another_evaluation_trains_nothing(segment, tmp_path):
    once.sweep([segment.trial(6, lr=0.1)], store=tmp_path)
    STEPS.clear()
    other = once.Segment(
        build, step, evaluate=lambda objects: objects["average"], inputs={"images": IMAGES}
    )
    report = once.sweep([other.trial(6, lr=0.1)], store=tmp_path)
    assert STEPS == []
    assert report.results[0].value > 0


def test_states_that_were_evicted_or_damaged_are_trained_again_and_equal(segment, tmp_path):
    trials = late_decays(segment)
    first = once.sweep(trials, store=tmp_path)
    states = [digest(result.state()) for result in first.results]
    store = once.open_store(tmp_path)
    for name in list(store.blobs.names()):
        path = store.blobs._path(name)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    again = once.sweep(trials, store=once.open_store(tmp_path))
    assert [r.value for r in again.results] == [r.value for r in first.results]
    assert [digest(result.state()) for result in again.results] == states


def test_states_are_kept_at_the_multiples_that_were_asked_for(segment, tmp_path):
    once.sweep([segment.trial(10, lr=0.1)], store=tmp_path, save_every=4)
    STEPS.clear()
    once.sweep([segment.trial(9, lr={0: 0.1, 8: 0.3})], store=tmp_path)
    assert STEPS == [8]


def test_a_step_that_reads_a_clock_is_not_stored_and_the_report_says_why(segment, tmp_path):
    import time

    def timed(objects, hyper, index):
        objects["average"] = time.time() * 0
        STEPS.append(index)

    timed_segment = once.Segment(build, timed, inputs={"images": IMAGES})
    trials = [timed_segment.trial(5, lr={0: 0.1, at: 0.2}) for at in (3, 4)]
    report = once.sweep(trials, store=tmp_path)
    assert len(STEPS) == 4 + 2 + 1  # shared within one sweep all the same
    assert "not stored: " in str(report)
    assert "clock" in str(report)


def test_a_failing_step_fails_the_sweep_and_keeps_what_was_trained(segment, tmp_path):
    def failing(objects, hyper, index):
        STEPS.append(index)
        if hyper["lr"] > 1:
            raise ValueError("diverged")

    broken = once.Segment(build, failing, inputs={"images": IMAGES})
    with pytest.raises(NodeError, match="diverged"):
        once.sweep([broken.trial(6, lr={0: 0.1, 4: 2.0})], store=tmp_path, save_every=4)
    STEPS.clear()
    once.sweep([broken.trial(6, lr=0.1)], store=tmp_path)
    assert STEPS == [4, 5]


def test_what_has_no_state_is_refused_by_name():
    with pytest.raises(StateMismatchError, match="'thing' is a object, which says nothing"):
        capture({"thing": object()})
    model = nn.Linear(2, 2)
    state = capture({"model": model})
    with pytest.raises(StateMismatchError, match="does not fit"):
        restore({"other": model}, state)


def test_modes_frozen_parameters_and_gradients_are_part_of_the_state():
    def made():
        return {"model": nn.Sequential(nn.Linear(2, 2), nn.Dropout())}

    first = made()
    first["model"][0].weight.requires_grad_(False)
    first["model"][1].eval()
    first["model"][0].bias.grad = torch.ones(2)
    again = made()
    restore(again, capture(first))
    assert not again["model"][0].weight.requires_grad
    assert [part.training for part in again["model"].modules()] == [True, True, False]
    assert torch.equal(again["model"][0].bias.grad, torch.ones(2))


def test_halving_promotes_the_best_and_promotions_go_on_from_stored_states(segment, tmp_path):
    trials = [segment.trial(12, lr=lr) for lr in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)]
    search = once.Halving(trials, rungs=(2, 4, 12), factor=2)
    counts = []
    while batch := search.ask():
        report = once.sweep(batch, store=tmp_path)
        counts.append((len(batch), report.steps_computed))
        for result in report.results:
            search.tell(result)
    assert counts[0] == (6, 12)
    assert sum(number for number, _ in counts) == 6 + 3 + 1
    assert sum(steps for _, steps in counts) == 6 * 2 + 3 * 2 + 1 * 8
    assert search.best().num_steps == 12
    with pytest.raises(ConfigError, match="not asked for"):
        search.tell(report.results[0])


def test_arguments_that_do_not_fit_are_refused(segment):
    with pytest.raises(ConfigError, match="at least one trial"):
        once.sweep([])
    with pytest.raises(ConfigError, match="trains nothing"):
        segment.trial(0, lr=0.1)
    with pytest.raises(ConfigError, match="no value at step 0"):
        segment.trial(3, lr={1: 0.1}).values(0)
    with pytest.raises(ConfigError, match="none for step 2"):
        segment.trial(3, lr=[0.1, 0.1]).values(2)
    with pytest.raises(ConfigError, match="growing"):
        once.Halving([], rungs=(3, 3))
