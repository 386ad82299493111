"""Sequence-length warm-up, freezing and early stop, each by what is its own."""

import math

import pytest
import torch
from torch import nn

from trainonce.errors import ConfigError
from trainonce.levers.base import Lever, Stack
from trainonce.levers.early_stop import EarlyStop
from trainonce.levers.flops import count_flops
from trainonce.levers.freeze import Freeze
from trainonce.levers.schedule import Schedule
from trainonce.levers.sequence import SequenceWarmup


def test_sequences_grow_through_the_divisors_and_no_token_is_lost():
    warmup = SequenceWarmup(128, 100, ramp=0.4, shortest=16)
    tokens = torch.arange(4 * 128).view(4, 128)
    lengths = []
    for step in range(100):
        warmup.begin_step(step)
        shaped = warmup.shape_batch({"x": tokens, "y": (tokens + 1, torch.ones(4))})
        lengths.append(shaped["x"].shape[1])
        assert torch.equal(shaped["x"].flatten(), tokens.flatten())
        assert torch.equal(shaped["y"][0], shaped["x"] + 1)
        assert shaped["y"][1].shape == (4,)
        assert warmup.ramping(step) == (lengths[-1] < 128)
    assert sorted(set(lengths)) == [16, 32, 64, 128]
    assert lengths == sorted(lengths)
    assert lengths[40:] == [128] * 60


def test_a_batch_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="128 tokens"):
        SequenceWarmup(128, 100).shape_batch(torch.ones(4, 100))


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2))


def steps(model, freeze, count, scale=lambda _step: 1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(count):
        freeze.begin_step(step)
        (model(torch.ones(4, 4)).square().sum() * scale(step)).backward()
        freeze.end_step(step)
        optimizer.zero_grad()


def test_a_settled_prefix_is_frozen_and_its_backward_is_not_computed():
    model = blocks()
    parts = [model[0], model[1], model[2], model[3]]
    model[1].eval()  # so that gradients depend on the scale alone
    freeze = Freeze(parts, window=2, threshold=0.5, patience=2)
    _, before = count_flops(lambda: model(torch.ones(4, 4)).sum().backward())
    steps(model, freeze, 6, scale=lambda step: 1.0 if step < 2 else 0.1)
    assert freeze.num_frozen == 1
    freeze.begin_step(6)
    model.zero_grad()
    _, after = count_flops(lambda: model(torch.ones(4, 4)).sum().backward())
    assert after < before
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_a_layer_that_still_learns_is_not_frozen_and_the_last_never_is():
    freeze = Freeze(blocks(), window=2, threshold=0.5, patience=2)
    freeze._blocks[1].eval()
    steps(nn.Sequential(*freeze._blocks), freeze, 30)
    assert freeze.num_frozen == 0
    steps(nn.Sequential(*freeze._blocks), freeze, 80, scale=lambda step: 0.5**step)
    assert freeze.num_frozen == 3


def test_switching_off_thaws_what_it_froze_and_nothing_else():
    model = blocks()
    model[0].bias.requires_grad_(False)
    freeze = Freeze(list(model), window=1)
    freeze.load_state_dict({**freeze.state_dict(), "num_frozen": 2})
    assert not any(p.requires_grad for p in (*model[0].parameters(), *model[1].parameters()))
    assert not model[1].training
    model.train()
    freeze.begin_step(1)
    assert not model[1].training  # the user's own train() does not thaw statistics
    freeze.enabled = False
    freeze.begin_step(2)
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
    assert model[1].training


def test_a_frozen_prefix_works_under_ddp_that_looks_for_unused_parameters(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = blocks()
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        freeze = Freeze(list(model), window=1)
        for num_frozen in (0, 1, 2, 2):
            freeze.load_state_dict({**freeze.state_dict(), "num_frozen": num_frozen})
            freeze.begin_step(0)
            ddp(torch.ones(4, 4)).sum().backward()
            assert (model[0].weight.grad is None) == (num_frozen > 0)
            assert model[3].weight.grad is not None
            ddp.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


def schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    return Schedule(optimizer, 100, warmup=0.1, decay_from=0.5)


def test_it_stops_after_patience_and_says_why():
    stop = EarlyStop(patience=2, min_delta=0.1)
    values = [1.0, 0.8, 0.75, 0.79]
    decisions = [stop.observe(step, value) for step, value in enumerate(values)]
    assert [decision.stop for decision in decisions] == [False, False, False, True]
    assert decisions[-1].reason == "no gain over 0.8 in 2 evaluations"


def test_it_never_stops_before_the_rate_decays():
    stop = EarlyStop(patience=1, schedule=schedule())
    decisions = [stop.observe(step, 1.0) for step in (5, 20, 49)]
    assert not any(decision.stop for decision in decisions)
    assert "before step 50" in decisions[-1].reason
    assert not stop.observe(50, 1.0).stop  # the first value that counts
    assert stop.observe(51, 1.0).stop


def test_it_waits_for_levers_that_ramp():
    ramp = SequenceWarmup(8, 10, ramp=0.5, shortest=2)
    stop = EarlyStop(target=1.0, wait_for=[Stack(ramp=ramp)])
    assert stop.observe(0, 0.5).reason == "stack still ramps at step 0"
    assert stop.observe(5, 0.5).stop


def test_a_return_must_hold_its_target():
    stop = EarlyStop(target=475, hold=2, better="higher")
    found = [stop.observe(step, v).stop for step, v in enumerate([480, 400, 480, 500])]
    assert found == [False, False, False, True]


def test_nan_is_no_improvement():
    stop = EarlyStop(patience=2)
    assert [stop.observe(s, v).stop for s, v in enumerate([1.0, math.nan, math.nan])][-1]


@pytest.mark.parametrize(
    "arguments", [{}, {"patience": 0}, {"target": 1, "hold": 0}, {"patience": 1, "better": "up"}]
)
def test_an_early_stop_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ConfigError):
        EarlyStop(**arguments)


def test_a_stack_takes_levers_only():
    with pytest.raises(ConfigError, match="no lever"):
        Stack(model=nn.Linear(1, 1))
    assert isinstance(Stack(), Lever)
