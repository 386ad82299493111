"""Streams of frames, and row stores, within a budget of bytes."""

import pytest
import torch
from torch import nn

import trainonce as once
from trainonce.errors import ConfigError, DataError, StoreError
from trainonce.graph.features import tables


def model(kind=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), kind(), nn.Linear(8, 4)).eval()


def frames(count):
    return torch.rand(count, 4, 4, generator=torch.Generator().manual_seed(1))


def test_each_distinct_frame_is_computed_once_and_the_oldest_give_way_to_the_budget():
    net = model()
    serve = once.FrameCache(net, max_bytes=10 * (256 + 16))
    stream = frames(8)
    for _ in range(3):
        for frame in stream:
            assert torch.equal(serve(frame), net(frame[None])[0])
    assert (serve.report.computed, serve.report.hits) == (8, 16)
    for frame in frames(40):
        serve(frame)
    assert serve.size_bytes <= 10 * (256 + 16)
    assert serve.report.evicted >= 30


def test_changed_weights_serve_nothing_old():
    net = model()
    serve = once.FrameCache(net, max_bytes=1 << 20)
    serve(frames(1)[0])
    with torch.no_grad():
        net[1].bias.add_(1.0)
    assert torch.equal(serve(frames(1)[0]), net(frames(1))[0])
    assert serve.report.computed == 2
    net[1].bias = nn.Parameter(net[1].bias + 1.0)  # another object in its place
    assert torch.equal(serve(frames(1)[0]), net(frames(1))[0])


def test_what_a_caller_does_to_an_output_reaches_nobody_else():
    net = model()
    serve = once.FrameCache(net, max_bytes=1 << 20)
    for _ in range(3):
        output = serve(frames(1)[0])
        assert torch.equal(output, net(frames(1))[0])
        output.add_(100.0)


def test_near_frames_are_one_only_where_that_is_declared_and_are_audited():
    net = model()
    frame = torch.full((4, 4), 0.5)
    plain = once.FrameCache(net, max_bytes=1 << 20)
    near = once.FrameCache(net, max_bytes=1 << 20, step=0.1, tolerance=0.2, audit=0.5)
    for number in range(40):
        noisy = frame + 0.001 * number / 40
        plain(noisy)
        near(noisy)
    assert plain.report.computed == 40
    assert (near.report.computed, near.report.near_hits) == (1, 39)
    assert 5 < near.report.audited < 35
    assert 0 < near.report.worst < 0.2
    assert near.report.ended == ""


def test_the_first_audit_beyond_the_tolerance_ends_the_quantisation(caplog):
    net = model()
    serve = once.FrameCache(net, max_bytes=1 << 20, step=0.5, tolerance=1e-6, audit=1.0)
    serve(torch.full((4, 4), 0.5))
    other = torch.full((4, 4), 0.6)
    assert torch.equal(serve(other), net(other[None])[0])
    assert "over the declared 1e-06" in serve.report.ended
    assert serve.step is None
    assert torch.equal(serve(other), net(other[None])[0])


def test_what_is_not_declared_or_not_deterministic_is_refused():
    with pytest.raises(ConfigError, match="declared tolerance"):
        once.FrameCache(model(), max_bytes=1000, step=0.1)
    with pytest.raises(ConfigError, match="leaves no room"):
        once.FrameCache(model(), max_bytes=0)
    with pytest.raises(DataError, match="random"):
        once.FrameCache(model(nn.Dropout).train(), max_bytes=1000)(frames(1)[0])


def test_rows_stay_within_a_budget_by_evicting_other_modules_or_say_that_they_do_not_fit(tmp_path):
    data = torch.randn(2000, 4, 4)
    budget = 300_000
    for seed in range(4):
        net = model()
        with torch.no_grad():
            net[1].bias.add_(float(seed))
        rows = once.features(net[:3], data, batch_size=100, store=tmp_path, budget_bytes=budget)
        assert torch.equal(rows.batch([5]), net[:3](data[:100])[5:6])
        assert sum(table.size_bytes for table in tables.tables(tmp_path / "rows")) <= budget
    with pytest.raises(StoreError, match="do not fit a budget of 50,000 bytes"):
        once.features(nn.Flatten(), data, batch_size=100, store=tmp_path, budget_bytes=50_000)
