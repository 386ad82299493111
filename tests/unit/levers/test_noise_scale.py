"""The gradient noise scale, on gradients whose noise is known."""

import math

import pytest
import torch

from trainonce.errors import ConfigError
from trainonce.levers.noise_scale import NoiseScale
from trainonce.levers.schedule import Schedule


def run(lever, parameter, optimizer, steps, noise, signal, batch=16):
    """Gradients of mean `signal` in each of 1,000 coordinates, with the noise of a batch."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        lever.begin_step(step)
        samples = batch * lever.num_batches
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = signal + noise * drawn / samples**0.5
        optimizer.step()
        lever.end_step(step)
        optimizer.zero_grad()


def setup(**options):
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    return parameter, optimizer, NoiseScale(optimizer, 16, **options)


def test_the_estimate_is_the_noise_over_the_signal_in_samples():
    parameter, optimizer, lever = setup(every=1000, smoothing=0.99)
    assert math.isnan(lever.noise_scale)
    run(lever, parameter, optimizer, 600, noise=2.0, signal=1.0)
    assert lever.noise_scale == pytest.approx(4.0, rel=0.1)  # sigma² / g²


def test_the_batch_grows_to_the_noise_scale_and_the_rate_by_its_root():
    parameter, optimizer, lever = setup(every=20)
    run(lever, parameter, optimizer, 400, noise=9.0, signal=1.0)
    assert lever.num_batches == 8  # 128 samples, the first power of two beyond 81
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 8**0.5)


def test_clear_gradients_leave_batch_and_rate_alone():
    parameter, optimizer, lever = setup(every=20)
    run(lever, parameter, optimizer, 200, noise=1.0, signal=1.0)
    assert lever.num_batches == 1
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_pure_noise_grows_the_batch_to_its_limit_and_no_further():
    parameter, optimizer, lever = setup(every=10, most=4)
    run(lever, parameter, optimizer, 200, noise=1.0, signal=0.0)
    assert lever.num_batches == 4


def test_it_keeps_to_the_schedule():
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = Schedule(optimizer, 100, warmup=0.1)
    lever = NoiseScale(optimizer, 16, schedule=schedule)
    lever.load_state_dict({**lever.state_dict(), "num_batches": 4})
    for step in (3, 50, 99):
        schedule.begin_step(step)
        lever.begin_step(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * schedule.factor(step))


def test_a_large_model_is_looked_at_in_part_and_always_in_the_same_part():
    parameter = torch.nn.Parameter(torch.zeros(300_000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    lever = NoiseScale(optimizer, 16)
    parameter.grad = torch.arange(300_000.0)
    assert torch.equal(lever._sample(), lever._sample())
    assert len(lever._sample()) == 1 << 16


@pytest.mark.parametrize("options", [{"most": 3}, {"every": 1}, {"smoothing": 1.0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="no noise scale"):
        setup(**options)
