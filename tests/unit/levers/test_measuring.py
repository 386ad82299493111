"""What a run used, and what torch's counter misses."""

import pytest
import torch
import torch.nn.functional as F

from trainonce.ledger.energy import TdpMeter
from trainonce.levers.flops import FlopCache, count_flops
from trainonce.levers.usage import UsageMeter, measure_peak_flops


def test_attention_on_the_cpu_is_counted_as_its_matrix_products_are():
    query = torch.randn(2, 4, 16, 8, requires_grad=True)

    def fused():
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    def by_hand():
        scores = (query @ query.transpose(-1, -2)) / 8**0.5
        (scores.softmax(-1) @ query).sum().backward()

    _, flops_fused = count_flops(fused)
    _, flops_by_hand = count_flops(by_hand)
    scores_again = 2 * 2 * 4 * 16 * 16 * 8  # the fused backward computes them a second time
    assert flops_fused == flops_by_hand + scores_again


def test_forward_and_backward_of_a_linear_layer_are_two_flops_a_multiplication():
    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    _, flops = count_flops(lambda: layer(x).sum().backward())
    assert flops == 3 * (2 * 3 * 5 * 7)


def test_counting_does_not_change_values():
    torch.manual_seed(0)
    x = torch.randn(9, 9)
    counted, _ = count_flops(lambda: (x @ x).tanh())
    assert torch.equal(counted, (x @ x).tanh())


def test_a_known_step_runs_once_and_is_not_counted_again():
    calls = []
    cache, x = FlopCache(), torch.ones(2, 2)
    for _ in range(3):
        _, flops = cache.call("same", lambda: calls.append(x @ x))
        assert flops == 16
    assert len(calls) == 3


def test_the_meter_adds_up_steps_and_leaves_out_what_is_not_running():
    meter, x = UsageMeter(), torch.ones(4, 4)
    for _ in range(3):
        with meter.running():
            meter.step("mm", lambda: x @ x, samples=4, tokens=8)
    total = meter.total()
    assert (total.flops, total.samples, total.tokens, total.steps) == (3 * 128, 12, 24, 3)
    assert total.cpu_s > 0
    assert total.wall_s > 0
    before = meter.total()
    sum(range(100_000))
    assert meter.total() == before
    rates = total.rates(peak_flops=total.flops / total.wall_s)
    assert rates["mfu"] == pytest.approx(1)
    assert rates["samples_per_s"] == pytest.approx(12 / total.wall_s)


def test_an_estimate_is_not_taken_for_measured_energy():
    assert UsageMeter(energy=TdpMeter(100.0)).total().energy_j is None


def test_measured_energy_is_what_the_counter_grew_by():
    class Counter:
        source, is_estimate, now_j = "rapl", False, 100.0

        def read_j(self):
            return self.now_j

    counter = Counter()
    meter = UsageMeter(energy=counter)
    with meter.running():
        counter.now_j = 107.0
    counter.now_j = 500.0
    assert meter.total().energy_j == 7.0


def test_the_peak_of_this_device_is_above_what_a_small_step_reaches():
    assert measure_peak_flops(size=64, repeats=2) > 0
