"""Loading is measured where it happens, and the transform that takes the time is named."""

import time

import pytest
import torch

from trainonce.worker.loader import ShardedLoader
from trainonce.worker.loading import LoadingTimes
from trainonce.worker.observe import LightProfile, LoaderAdvice


def work(seconds):
    """Keep the processor busy: a transform does not sleep."""
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass


class Normalise:
    def __call__(self, x):
        return x - x.mean()


class SlowResize:
    def __call__(self, x):
        work(0.025)
        return x


class Compose:
    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


class Images(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.transform(torch.full((4,), float(index)))


def load_all(transform, **options):
    loader = ShardedLoader(Images(transform), 2, seed=0, world_size=1, rank=0, **options)
    batches = list(loader)
    return loader, batches


@pytest.mark.parametrize("num_workers", [0, 1])
def test_slow_transform_is_named_also_from_another_process(num_workers):
    loader, batches = load_all(Compose(Normalise(), SlowResize()), num_workers=num_workers)
    assert loader.times.seconds_a_sample() > 0.02
    named = loader.times.slowest()
    assert named.startswith(("__call__ (test_loading.py:", "work (test_loading.py:"))
    assert len(batches) == 32


def test_what_is_fast_is_measured_and_not_profiled():
    loader, _ = load_all(Normalise())
    assert 0 < loader.times.seconds_a_sample() < 0.02
    assert loader.times.slowest() == ""


def test_batches_are_the_same_with_and_without_the_measurement(monkeypatch):
    _, measured = load_all(Normalise(), shuffle=True)
    monkeypatch.setattr(LoadingTimes, "load", lambda self, count, read: read())
    _, plain = load_all(Normalise(), shuffle=True)
    assert all(torch.equal(one, other) for one, other in zip(measured, plain, strict=True))


def test_an_error_while_loading_is_the_users_own():
    def fail(x):
        raise LookupError("no such image")

    with pytest.raises(LookupError, match="no such image"):
        load_all(fail)


class Times:
    def __init__(self, seconds, slowest="resize (data.py:3)"):
        self.seconds_a_sample = lambda: seconds
        self.slowest = lambda: slowest


def advise(times, waited_share):
    sent, now_ns = [], 0

    def waited_ns():
        return int(now_ns * waited_share)

    advice = LoaderAdvice(waited_ns, lambda: 1, sent.append)
    advice.watch(times)
    begun_ns = time.monotonic_ns()
    for _ in range(64):
        now_ns = 10**9 + (time.monotonic_ns() - begun_ns)
        advice.after_commit()
    return sent


def test_advice_comes_once_and_only_where_samples_are_slow_and_waited_for():
    report, note = advise(Times(0.034), 0.9)
    assert report.event["kind"] == "loader_slow"
    assert report.event["slowest"] == "resize (data.py:3)"
    assert "34 ms" in note.text
    assert "prepare it offline" in note.text
    assert advise(Times(0.034), 0.0) == []
    assert advise(Times(0.019), 0.9) == []
    assert advise(Times(0.034, ""), 0.9) == []


class Epochs:
    current_epoch = 0


def test_light_profile_takes_some_steps_of_each_epoch_and_names_what_they_spend_time_in():
    sent, loops = [], Epochs()
    profile = LightProfile(60.0, loops, lambda: 0, sent.append)
    x = torch.randn(64, 64)
    for loops.current_epoch in (0, 1):
        for _ in range(40):
            x = (x @ x).tanh()
            profile.after_commit()
    first, second = (message.event for message in sent)
    assert (first["kind"], first["epoch"], second["epoch"]) == ("hot_spots", 0, 1)
    assert first["steps"] == 3
    assert {name for name, _ in first["spots"]} >= {"aten::mm", "aten::tanh"}
    assert sum(share for _, share in first["spots"]) == pytest.approx(1.0, abs=0.2)


def test_other_ranks_profile_nothing():
    sent = []
    profile = LightProfile(60.0, Epochs(), lambda: 1, sent.append)
    for _ in range(60):
        profile.after_commit()
    assert sent == []
