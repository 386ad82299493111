"""Quantized training: with torchao where it is installed, and what is said where it is not."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trainonce
from trainonce.errors import ConfigError
from trainonce.levers import quantized
from trainonce.levers.quantized import quantized_training

from .test_fit import quiet

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
# What torchao 0.18 itself does on import.
lenient = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 16, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def loss(out, batch):
    return nn.functional.cross_entropy(out, batch[1], reduction="none")


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_quantized_training_says_why_it_cannot_be_here(dtype):
    with pytest.raises(ConfigError, match="on cpu") as caught:
        quantized_training(make(), dtype)
    assert caught.value.hint == "take bf16"
    with pytest.raises(ConfigError, match="'fp4'"):
        quantized_training(make(), "fp4")
    model = make()
    assert quantized_training(model, dtype, enabled=False) is model


def test_quantized_training_asks_for_hardware_torchao_and_layers(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert "8.9" in quantized.why_not("fp8", device)
    monkeypatch.setattr(quantized, "why_not", lambda *_, **__: "")
    with pytest.raises(ConfigError, match="no linear layer") as caught:
        quantized_training(nn.Sequential(nn.Linear(15, 16), nn.Conv2d(16, 16, 1)))
    assert "16" in caught.value.hint


def test_torchao_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _name: None)
    assert "not installed" in quantized.why_not("int8", torch.device("cpu"), emulate=True)


@needs_torchao
@lenient
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_it_multiplies_coarsely_and_comes_near_the_float32_gradient(dtype):
    x, _ = data()
    plain, coarse = make(), quantized_training(make(), dtype, emulate=True)
    for model in (plain, coarse):
        model(x).square().mean().backward()
    assert type(coarse[0]) is not nn.Linear
    assert type(coarse[3]) is nn.Linear  # three outputs are no multiple of 16
    for mine, theirs in zip(coarse.parameters(), plain.parameters(), strict=True):
        assert type(mine) is nn.Parameter
        assert not torch.equal(mine.grad, theirs.grad)
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.15


@needs_torchao
@lenient
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_fit_trains_with_it_resumes_bit_identically_and_keeps_plain_weights(
    dtype, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRAINONCE_PRECISION", "tf32")
    plan = trainonce.plan(make(), data(), loss, steps=80)
    plan = plan.override("quantized", on=True, dtype=dtype, emulate=True)
    weights, results = [], []
    for folder in ("one", "two"):
        model = make()
        results.append(
            trainonce.fit(model, data(), loss, plan=plan, folder=tmp_path / folder, progress=quiet)
        )
        weights.append(model.state_dict())
    assert results[0].history == results[1].history
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert results[0].loss < 0.6 * results[0].history[0][1]
    assert load_file(results[0].weights).keys() == make().state_dict().keys()
