"""What is registered, watched, given and taken."""

import pytest
import torch

from trainonce.errors import ConfigError, StateError, StateMismatchError
from trainonce.worker.state import Protected


def build(seed=0, *, width=8, optimizer=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1)
    )
    chosen = optimizer(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(chosen, 2, 0.5)
    return model, chosen, scheduler


def train(model, optimizer, scheduler, steps=3):
    for _ in range(steps):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def protect(parts):
    model, optimizer, scheduler = parts
    return Protected({"model": model, "optimizer": optimizer, "scheduler": scheduler})


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop])
def test_a_newcomer_that_takes_the_state_goes_on_bit_for_bit(optimizer):
    donor = build(optimizer=optimizer)
    train(*donor)
    given = protect(donor)
    given.capture()
    image = given.live()
    newcomer = build(seed=1, optimizer=optimizer)
    taken = protect(newcomer)
    for (_, target), (_, source) in zip(
        taken.prepare(given.describe(image)), image.tensors, strict=True
    ):
        target.data.copy_(source.data)
    taken.load_local_buffers(given.local_buffers())
    torch.manual_seed(7)
    train(*donor)
    torch.manual_seed(7)
    train(*newcomer)
    for key, value in donor[0].state_dict().items():
        assert torch.equal(value, newcomer[0].state_dict()[key]), key
    assert donor[1].param_groups[0]["lr"] == newcomer[1].param_groups[0]["lr"]
    assert donor[2].state_dict() == newcomer[2].state_dict()


def test_small_state_is_that_of_the_commit_not_of_now():
    parts = build()
    protected = protect(parts)
    protected.capture()
    before = parts[1].param_groups[0]["lr"]
    parts[1].param_groups[0]["lr"] = 99.0
    record = protected.describe(protected.live())
    other = protect(build())
    other.prepare(record)
    assert other.optimizers["optimizer"].param_groups[0]["lr"] == before


def test_a_schedule_warns_in_a_newcomer_where_it_would_have_in_the_process_before():
    def take(stepped, rehearsed):
        donor, newcomer = build(), build()
        for parts in (donor,) * stepped + (newcomer,) * rehearsed:
            parts[1].step()
        given = protect(donor)
        given.capture()
        protect(newcomer).prepare(given.describe(given.live()))
        return newcomer[2]

    take(stepped=True, rehearsed=False).step()  # warnings are errors
    early = take(stepped=False, rehearsed=True)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        early.step()


def test_a_change_outside_a_step_is_named():
    parts = build()
    protected = protect(parts)
    protected.check_unchanged()
    with torch.no_grad():
        parts[0][2].bias.add_(1)
    with pytest.raises(StateError, match=r"model\.2\.bias was changed outside a step"):
        protected.check_unchanged()


def test_an_image_is_put_back_whole_and_new_optimizer_state_is_removed():
    parts = build()
    protected = protect(parts)
    image = protected.image()
    digest = protected.digest()
    train(*parts)
    assert protected.digest() != digest
    protected.restore(image)
    assert protected.digest() == digest
    assert not parts[1].state


def test_another_model_is_told_what_differs():
    given = protect(build())
    given.capture()
    record = given.describe(given.live())
    with pytest.raises(StateMismatchError, match=r"model\.0\.weight as float32\[8, 4\]"):
        protect(build(width=5)).prepare(record)


def test_a_checkpoint_that_lacks_parameters_is_refused():
    given = protect(build())
    given.capture()
    record = given.describe_whole()
    lacking = {**record, "layout": [e for e in record["layout"] if e[0] != "model.0.weight"]}
    assert "model.0.weight" in protect(build()).prepare_whole(record)
    with pytest.raises(StateMismatchError, match=r"does not hold model\.0\.weight"):
        protect(build()).prepare_whole(lacking)


def test_running_statistics_are_local():
    parts = build()
    assert set(protect(parts).local_buffers()) == {
        "model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"
    }  # fmt: skip


def test_parameters_shared_by_two_names_are_kept_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    model["b"] = model["a"]
    assert len(Protected({"m": model, "again": model["a"]}).parameters()) == 2


def test_what_cannot_be_protected_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match=r"best=float.*\n?.*run\.state"):
        Protected({"best": 1.0})


def test_gradients_left_behind_by_a_commit_do_not_wait_and_new_ones_do():
    model, optimizer, _ = parts = build()
    protected = protect(parts)
    model(torch.randn(8, 4)).sum().backward()
    assert protected.gradients_wait()
    optimizer.step()
    protected.capture()
    assert not protected.gradients_wait()
    model(torch.randn(8, 4)).sum().backward()  # adds to what is there
    assert protected.gradients_wait()
    optimizer.zero_grad()
    assert not protected.gradients_wait()
    model(torch.randn(8, 4)).sum().backward()
    assert protected.gradients_wait()


def test_state_of_channels_last_weights_lies_in_memory_as_it_did():
    """A fused optimizer goes by memory: state that lies otherwise than its weight is mixed up."""

    def build(seed):
        torch.manual_seed(seed)
        conv = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(conv.parameters(), lr=1e-2, fused=True)
        return Protected({"model": conv, "optimizer": optimizer}), conv, optimizer

    def train(conv, optimizer):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
        conv(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    given, *donor = build(0)
    train(*donor)
    given.capture()
    taken, *newcomer = build(1)
    found = taken.prepare(given.describe(given.live()))
    for (_, target), (_, source) in zip(found, given.live().tensors, strict=True):
        target.data.copy_(source.data)
        assert target.stride() == source.stride()
    train(*donor)
    train(*newcomer)
    assert torch.equal(donor[0].weight, newcomer[0].weight)
