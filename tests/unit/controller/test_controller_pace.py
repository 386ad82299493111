"""Slow ranks, found from the progress pages of a running job."""

import pytest

from trainonce.wire.messages import Generation


def walk(bench, steps, busy_ms, loader_ms=None, step_ms=200):
    """Let all ranks commit `steps` steps; times by rank, in milliseconds."""
    first = bench.rank(0).progress["commits"]
    for step in range(first + 1, first + steps + 1):
        for rank, busy in enumerate(busy_ms):
            page = bench.rank(rank).progress
            # Some scatter, the same in each run: no two steps are alike.
            page["busy_ns"] = int((busy + 0.1 * ((step * 7 + rank * 3) % 5)) * 1e6)
            page["loader_ns"] = int((loader_ms[rank] if loader_ms else 1.0) * 1e6)
            page["step_ns"] = int(step_ms * 1e6)
        bench.clock.advance(0.3)
        bench.commit(step)


def test_slow_rank_is_named_once_with_what_it_costs(bench):
    b = bench(nproc=4).ready()
    walk(b, 60, [100, 100, 130, 100])
    (found,) = b.of_kind("straggler_found")
    assert (found.rank, found.cause, found.host) == (2, "computing", "here")
    assert found.excess_s == pytest.approx(0.030, rel=0.1)
    (line,) = [line for line in b.lines if "rank 2 takes" in line]
    assert "trainonce migrate j --rank 2" in line


def test_rank_with_a_slow_loader_is_told_as_such(bench):
    b = bench(nproc=3).ready()
    walk(b, 60, [100, 100, 100], [1.0, 40.0, 1.0])
    (found,) = b.of_kind("straggler_found")
    assert (found.rank, found.cause) == (1, "loading")


@pytest.mark.parametrize(
    ("busy_ms", "step_ms"),
    [
        pytest.param([100, 100, 100, 100], 200, id="all alike"),
        pytest.param([100, 101, 99, 100], 200, id="scatter"),
        pytest.param([2, 2, 4, 2], 500, id="a large share of little"),
    ],
)
def test_healthy_ranks_are_not_named(bench, busy_ms, step_ms):
    b = bench(nproc=4).ready()
    walk(b, 80, busy_ms, step_ms=step_ms)
    assert b.of_kind("straggler_found") == []


def test_of_two_ranks_neither_is_named(bench):
    b = bench(nproc=2).ready()
    walk(b, 60, [100, 200])
    assert b.of_kind("straggler_found") == []


def test_worker_that_took_over_a_slow_rank_starts_with_a_clean_record(bench):
    b = bench(nproc=3, spares=1).ready()
    walk(b, 30, [100, 100, 150])
    assert len(b.of_kind("straggler_found")) == 1
    b.rank(2).end(signum=9)
    b.step()
    assert b.rank(2).heard(Generation)
    b.form(b.job.step)
    walk(b, 60, [100, 100, 100])
    assert len(b.of_kind("straggler_found")) == 1
