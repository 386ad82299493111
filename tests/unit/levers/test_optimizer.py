import copy

import pytest
import torch
from torch import nn

from trainonce.errors import ConfigError
from trainonce.levers.flops import count_flops
from trainonce.levers.optimizer import (
    MuonAdamW,
    muon_adamw,
    muon_flops,
    orthogonalise,
    split_parameters,
)


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)


def convolutions():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 10))


def test_hidden_matrices_are_what_lies_between_the_ends():
    assert [n for n, _ in split_parameters(Language()).hidden] == ["up.weight", "down.weight"]
    assert [n for n, _ in split_parameters(convolutions()).hidden] == ["2.weight"]
    split = split_parameters(Language(), exclude=["down"])
    assert [name for name, _ in split.hidden] == ["up.weight"]


def test_every_trained_parameter_lands_in_one_side_once():
    model = Language()
    model.up.weight.requires_grad_(False)
    split = split_parameters(model)
    names = [name for name, _ in (*split.hidden, *split.rest)]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_an_output_tied_to_the_embedding_is_not_hidden():
    model = Language()
    model.head.weight = model.embed.weight
    hidden = [name for name, _ in split_parameters(model).hidden]
    assert "embed.weight" not in hidden
    assert "up.weight" in hidden


def test_on_matrices_the_numbers_are_those_of_torchs_own_muon():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9, 4))]
    theirs = copy.deepcopy(ours)
    group = {"params": ours, "muon": True, "ns_dtype": torch.bfloat16}
    mine = MuonAdamW([group], lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_muon_the_numbers_are_those_of_torchs_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))]
    theirs = copy.deepcopy(ours)
    mine = MuonAdamW(ours, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_kernel_is_stepped_as_the_matrix_it_flattens_to():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    for parameter in (kernel, matrix):
        MuonAdamW([{"params": [parameter], "muon": True}], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_singular_values_come_close_to_one():
    torch.manual_seed(0)
    for shape in ((8, 32), (32, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape)))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_the_formula_of_the_overhead_is_what_is_counted():
    matrix = torch.randn(6, 10)
    _, flops = count_flops(lambda: orthogonalise(matrix))
    assert flops == muon_flops([matrix]) == 5 * (4 * 36 * 10 + 2 * 216)


def test_the_gate_keeps_muon_off_where_it_costs_more_than_the_limit():
    model = Language()
    cost = muon_flops([model.up.weight, model.down.weight])
    dear = muon_adamw(model, 0.01, step_flops=cost * 9)
    cheap = muon_adamw(model, 0.01, step_flops=cost * 11)
    assert dear.reason == "off: it adds 11.1%, limit 10%"
    assert not any(group["muon"] for group in dear.param_groups)
    assert cheap.reason == "on: it adds 9.1%, limit 10%"
    assert [group["muon"] for group in cheap.param_groups] == [True, False, False]


def test_off_is_plain_adamw():
    torch.manual_seed(0)
    model = convolutions()
    other = copy.deepcopy(model)
    off = muon_adamw(model, 0.01, enabled=False, weight_decay=0.0)
    plain = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    x = torch.randn(3, 1, 8, 8)
    for net, optimizer in ((model, off), (other, plain)):
        net(x).square().mean().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_vectors_are_refused_with_a_hint():
    with pytest.raises(ConfigError, match="shape") as caught:
        MuonAdamW([{"params": [nn.Parameter(torch.ones(3))], "muon": True}])
    assert "muon_adamw" in caught.value.hint
