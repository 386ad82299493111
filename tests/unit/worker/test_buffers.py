"""What the pool keeps of the memory that it gets back."""

import torch

from trainonce.worker.buffers import BufferPool


def use(pool, *sizes):
    """Take buffers of these sizes at once, give them back, and return where they were."""
    buffers = [pool.take(torch.empty(size)) for size in sizes]
    pool.give(buffers)
    return {buffer.data_ptr() for buffer in buffers}


def test_memory_is_used_again_also_in_a_step_that_asks_for_this_and_then_for_that():
    pool = BufferPool()
    first = [use(pool, *[1000] * 8), use(pool, *[2000] * 4)]
    for _ in range(3):
        assert [use(pool, *[1000] * 8), use(pool, *[2000] * 4)] == first
    assert pool.held_bytes == pool.peak_bytes == 64000


def test_sizes_that_vary_without_end_do_not_take_memory_without_end():
    pool = BufferPool()
    for size in range(1, 1001):
        use(pool, size, 500)
    assert pool.peak_bytes <= 2 * 4 * 1500
    assert len(pool._free) < 20


def test_abandoned_memory_does_not_count():
    pool = BufferPool()
    pool.forget([pool.take(torch.empty(100))])
    assert pool.held_bytes == 0
