"""Recomputing activations by a budget."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainonce.errors import ConfigError
from trainonce.levers.block_costs import BlockCost
from trainonce.levers.flops import count_flops
from trainonce.levers.recompute import choose, compile_budget, recompute


class Layer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


def make():
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(16) for _ in range(4)), nn.Linear(16, 3))


def batch():
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def gradients(model, seed=5):
    torch.manual_seed(seed)
    model.zero_grad()
    model(batch()).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def saved_bytes(model):
    """Bytes that autograd holds for the backward pass, beside parameters."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(batch())
    del out
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("share", [1.0, 0.8, 0.4, 0.2])
def test_gradients_are_bit_identical_at_every_budget(share):
    model = make()
    plain = gradients(model)
    found = recompute(list(model)[:4], lambda: model(batch()), share=share)
    assert all(map(torch.equal, plain, gradients(model)))
    assert found.kept_bytes <= share * found.without_bytes
    assert (found.modes == ("keep",) * 4) == (share == 1.0)


def test_a_tight_budget_holds_less_memory_for_more_flops_and_is_taken_back_whole():
    model = make()
    plain, before = gradients(model), saved_bytes(model)
    _, flops = count_flops(lambda: gradients(model))
    found = recompute(list(model)[:4], lambda: model(batch()), share=0.12)
    assert set(found.modes) == {"full"}
    assert saved_bytes(model) < 0.5 * before
    _, more = count_flops(lambda: gradients(model))
    assert flops < more <= flops + found.extra_flops
    found.remove()
    assert saved_bytes(model) == before
    assert count_flops(lambda: gradients(model))[1] == flops
    assert all(map(torch.equal, plain, gradients(model)))


def test_a_forward_that_somebody_put_on_a_block_is_there_again_afterwards():
    model, calls = make(), []
    plain = model[0].forward
    model[0].forward = mine = lambda x: calls.append(len(x)) or plain(x)
    found = recompute(list(model)[:4], lambda: model(batch()), share=0.12)
    found.remove()
    found.remove()
    assert model[0].forward is mine
    assert "forward" not in vars(model[1])
    calls.clear()
    gradients(model)
    assert calls == [32]  # and nothing is computed twice


def test_selective_recomputing_repeats_no_matrix_product():
    model = make()
    _, flops = count_flops(lambda: gradients(model))
    found = recompute(list(model)[:4], lambda: model(batch()), share=0.7)
    assert "selective" in found.modes
    assert "full" not in found.modes
    assert found.extra_flops == 0
    assert count_flops(lambda: gradients(model))[1] == flops


def test_training_resumes_bit_identically_with_it_and_it_composes_with_autocast():
    def train(model, steps, optimizer=None):
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in steps:
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch()).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    whole, part, resumed = make(), make(), make()
    for model in (part, resumed):
        recompute(list(model)[:4], lambda model=model: model(batch()), share=0.3)
    train(whole, range(6))
    optimizer = train(part, range(3))
    resumed.load_state_dict(part.state_dict())
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    train(resumed, range(3, 6), other)
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_off_is_off():
    model = make()
    found = recompute(list(model)[:4], lambda: pytest.fail("measured"), enabled=False)
    assert found.modes == ("keep",) * 4
    assert all("forward" not in vars(block) for block in model)


@pytest.mark.parametrize("share", [0.7, 0.2])
def test_a_batch_norm_counts_a_batch_once(share):
    def normed():
        torch.manual_seed(0)
        parts = [
            nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 16))
            for _ in range(2)
        ]
        return nn.Sequential(*parts)

    plain, other = normed(), normed()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    found = recompute(list(other), lambda: other(batch()), share=share)
    assert "keep" not in found.modes
    other.load_state_dict(before)  # measuring is a forward pass too
    for _ in range(3):
        assert all(map(torch.equal, gradients(plain), gradients(other)))
    states = plain.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert int(other[0][1].num_batches_tracked) == 3


def cost(keep, selective, full, flops):
    kept = {"keep": keep, "selective": selective, "full": full}
    return BlockCost(kept_bytes=kept, extra_flops={"keep": 0, "selective": 0, "full": flops})


def test_the_cheapest_bytes_are_given_up_first():
    costs = [cost(100, 60, 10, 1000), cost(100, 60, 10, 10)]
    assert choose(costs, 200) == ("keep", "keep")
    assert choose(costs, 160) == ("selective", "keep")
    assert choose(costs, 120) == ("selective", "selective")
    assert choose(costs, 100) == ("selective", "full")
    assert choose(costs, 20) == ("full", "full")
    with pytest.raises(ConfigError, match="20 bytes") as caught:
        choose(costs, 19)
    assert caught.value.hint


@pytest.mark.parametrize("budget", [{}, {"share": 0.5, "budget_bytes": 3}, {"share": 1.5}])
def test_a_budget_that_makes_no_sense_is_refused(budget):
    with pytest.raises(ConfigError, match="no budget"):
        recompute(list(make())[:2], lambda: None, **budget)


def test_blocks_that_are_not_called_once_are_refused():
    model = make()
    with pytest.raises(ConfigError, match="called 0 times"):
        recompute(list(model)[:2], lambda: None, share=0.5)
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model)


def test_the_compilers_budget_is_set_and_given_back():
    from torch._functorch import config

    before = config.activation_memory_budget
    with compile_budget(0.5):
        assert config.activation_memory_budget == 0.5
    assert config.activation_memory_budget == before
    with pytest.raises(ConfigError, match="share is 2"), compile_budget(2):
        pass
