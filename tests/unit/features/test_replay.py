"""Values over a replay buffer: one evaluation for each network and observation."""

import numpy as np
import pytest
import torch
from torch import nn

import trainonce as once
from trainonce.errors import ConfigError, DataError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def filled(net, count=20, **options):
    values = once.ReplayValues(net, capacity=50, **options)
    observations = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return values, observations, [values.add(one.numpy()) for one in observations]


def test_each_observation_is_evaluated_once_until_the_network_changes():
    net = network()
    values, observations, slots = filled(net)
    for _ in range(5):
        chosen = np.random.default_rng(0).integers(0, 20, 16)
        got = values(np.array(slots)[chosen])
        assert torch.allclose(got, net(observations[chosen]), atol=1e-6)
        assert not got.requires_grad
    assert (values.report.requested, values.report.computed) == (80, len(set(chosen.tolist())))
    with torch.no_grad():
        net[0].weight.mul_(2.0)  # a hard update
    assert torch.allclose(values(slots), net(observations), atol=1e-6)
    assert values.report.networks == 2
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    computed = values.report.computed
    values(slots)
    assert (values.report.computed, values.report.networks) == (computed, 2)  # equal weights


def test_an_equal_observation_has_one_number_and_what_was_overwritten_is_refused():
    net = network()
    values = once.ReplayValues(net, capacity=4)
    numbers = [values.add(np.full(4, n, np.float32)) for n in (0, 1, 0, 2, 3, 0, 4)]
    # The second 0 is the first one; the third comes when that one is old, and is added anew.
    assert numbers == [0, 1, 0, 2, 3, 4, 5]
    assert (values.report.observations, values.report.repeated) == (6, 1)
    expected = net(torch.tensor([[2.0] * 4, [3.0] * 4, [0.0] * 4, [4.0] * 4]))
    assert torch.allclose(values([2, 3, 4, 5]), expected, atol=1e-6)
    with pytest.raises(DataError, match=r"1 of 2 observations were overwritten.*\n.*capacity"):
        values([1, 5])


def test_values_are_kept_for_another_run_and_another_network_has_its_own(tmp_path):
    values, _, slots = filled(network(), store=tmp_path)
    first = values(slots)
    values.flush()
    again, _, slots = filled(network(), store=tmp_path)
    assert torch.equal(again(slots), first)
    assert (again.report.loaded, again.report.computed) == (20, 0)
    other = network()
    with torch.no_grad():
        other[0].bias.add_(1.0)
    changed, _, slots = filled(other, store=tmp_path)
    changed(slots)
    assert (changed.report.loaded, changed.report.computed) == (0, 20)


def test_a_network_that_draws_and_arguments_that_do_not_fit_are_refused():
    values, _, slots = filled(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train())
    with pytest.raises(DataError, match="cannot be stored"):
        values(slots)
    with pytest.raises(DataError, match="no observation was added"):
        once.ReplayValues(network(), capacity=5)([0])
    with pytest.raises(ConfigError, match="at least 2"):
        once.ReplayValues(network(), capacity=1)
