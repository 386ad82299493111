import contextlib
import gc
import os
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from trainonce.errors import ConfigError
from trainonce.levers.memory import Accumulation, find_batch_size


def fits_up_to(limit, error=torch.OutOfMemoryError):
    tried = []

    def trial(size):
        tried.append(size)
        if size > limit:
            raise error(f"no room for {size}")

    return trial, tried


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 13])
@pytest.mark.parametrize("start", [1, 4, 64])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_the_largest_size_that_fits_is_found_from_below_and_from_above(limit, start, error):
    trial, tried = fits_up_to(limit, error)
    found = find_batch_size(trial, start=start)
    assert found.micro_batch == limit
    assert len(tried) == len(set(tried))  # no size is tried twice
    assert found.tried == {size: size <= limit for size in tried}
    assert str(limit) in found.reason


def test_large_sizes_are_found_to_within_a_sixteenth():
    trial, tried = fits_up_to(1000)
    assert 1000 * 15 / 16 <= find_batch_size(trial).micro_batch <= 1000
    assert len(tried) < 16


def test_a_maximum_is_never_exceeded():
    trial, tried = fits_up_to(10**9)
    found = find_batch_size(trial, maximum=100)
    assert found.micro_batch == max(tried) == 100
    assert found.reason == "100 is the maximum"


def test_one_sample_that_does_not_fit_is_an_error_with_a_hint():
    with pytest.raises(ConfigError, match="one sample") as caught:
        find_batch_size(fits_up_to(0)[0], start=8)
    assert caught.value.hint


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="out of memory, said a bug"):
        find_batch_size(fits_up_to(4, lambda _m: RuntimeError("out of memory, said a bug"))[0])


def test_a_real_refusal_of_the_cpu_allocator_is_recognised():
    def trial(size):
        torch.empty(size << 50, dtype=torch.uint8) if size > 2 else torch.empty(size)

    assert find_batch_size(trial, maximum=8).micro_batch == 2


def test_nothing_of_a_failed_trial_stays_in_memory():
    held = []

    def trial(size):
        activations = torch.ones(size, 1000)
        held.append(weakref.ref(activations))
        try:
            if size > 4:
                raise torch.OutOfMemoryError("full")
        except torch.OutOfMemoryError as error:
            raise MemoryError("wrapped by user code") from error

    find_batch_size(trial)
    gc.collect()
    assert len(held) > 3
    assert [ref() for ref in held] == [None] * len(held)


def test_model_optimizer_and_generators_are_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()

    def trial(size):
        model(torch.randn(size + 1, 3)).square().mean().backward()
        optimizer.step()
        if size > 4:
            raise torch.OutOfMemoryError("full")

    find_batch_size(trial, keep=[model, optimizer])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def _agreeing_rank(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    trial, tried = fits_up_to(5 if rank else 50)
    found = find_batch_size(trial)
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1, bias=False))
    batch = torch.arange(1.0, 4.0) if rank else torch.arange(4.0, 6.0)
    accumulation = Accumulation(2)
    scale = accumulation.scale(len(batch))
    for micro, sync in accumulation.split(batch[:, None], model):
        with sync:
            (model(micro).sum() * scale).backward()
    gradient = model.module.weight.grad.item()
    results.put((rank, found.micro_batch, tried, gradient))
    # Groups that DDP has used outlive their end, and a thread of gloo's that lets go of a tensor
    # while the interpreter shuts down aborts the process. So it does not shut down.
    os._exit(0)


def test_ranks_agree_on_the_smallest_and_average_over_all_samples(tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_agreeing_rank, (str(tmp_path / "store"), results), nprocs=2)
    (_, first, tried_0, gradient_0), (_, second, tried_1, gradient_1) = sorted(
        results.get() for _ in range(2)
    )
    assert first == second == 5
    assert tried_0 == tried_1
    # The mean over 1..5, though rank 1 has three of them and rank 0 two.
    assert gradient_0 == gradient_1 == pytest.approx(3.0)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10, 64])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(10, 4)
    weights = torch.rand(10)
    (model(x).square().sum(1) * weights).mean().backward()
    whole = model.weight.grad.clone()
    model.zero_grad()
    accumulation = Accumulation(micro_batch)
    scale = accumulation.scale(10)
    sizes = []
    for (part, weight), sync in accumulation.split((x, weights)):
        with sync:
            ((model(part).square().sum(1) * weight).sum() * scale).backward()
        sizes.append(len(part))
    assert sum(sizes) == 10
    assert max(sizes) <= micro_batch
    torch.testing.assert_close(model.weight.grad, whole)


def test_dicts_are_split_and_only_the_last_part_synchronises():
    class Model(nn.Module):
        quiet = 0

        @contextlib.contextmanager
        def no_sync(self):
            self.quiet += 1
            yield

    model, parts = Model(), []
    for part, sync in Accumulation(2).split({"x": torch.arange(5), "y": torch.ones(5)}, model):
        with sync:
            parts.append(part["x"].tolist())
    assert parts == [[0, 1], [2, 3], [4]]
    assert model.quiet == 2


def test_a_batch_in_which_nothing_counts_is_an_error():
    with pytest.raises(ConfigError, match="counts"):
        Accumulation(2).scale(0)
    with pytest.raises(ConfigError):
        Accumulation(0)
