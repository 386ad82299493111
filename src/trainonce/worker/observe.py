"""What a worker finds out about its own training: slow loading, and where the time goes."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from trainonce.events import HotSpots, LoaderSlow
from trainonce.wire.messages import Note, Report
from trainonce.worker.loading import ADVISE_S, ADVISE_WAIT_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.worker.loading import LoadingTimes
    from trainonce.worker.loops import Loops

_LOOK_EVERY = 16
_SETTLED_STEPS = 5
# Reading a profile takes some microseconds an operation, and a step may have tens of thousands.
_MAX_PROFILED_STEPS = 3
_TOP = 8


class LoaderAdvice:
    """Advises once to prepare samples offline, where they take long and are waited for.

    Args:
        waited_ns: Returns how long this rank has waited for batches.
        rank: Returns this rank.
        notify: Sends a message to the launcher.
    """

    def __init__(
        self,
        waited_ns: Callable[[], int],
        rank: Callable[[], int],
        notify: Callable[..., object],
    ) -> None:
        self._times: weakref.WeakSet[LoadingTimes] = weakref.WeakSet()
        self._waited_ns = waited_ns
        self._rank = rank
        self._notify = notify
        self._commits = 0
        self._begun = (0, 0)
        self._told: set[str] = set()

    def watch(self, times: LoadingTimes) -> None:
        """Look at the loading of samples that `times` measures, for as long as that lives."""
        self._times.add(times)

    def after_commit(self) -> None:
        """Look now and then."""
        self._commits += 1
        if self._commits % _LOOK_EVERY:
            return
        now = (time.monotonic_ns(), self._waited_ns())
        before, self._begun = self._begun, now
        share = (now[1] - before[1]) / max(now[0] - before[0], 1)
        if not before[0] or share < ADVISE_WAIT_SHARE:
            return
        for times in list(self._times):
            if times.seconds_a_sample() >= ADVISE_S and times.slowest() not in ("", *self._told):
                self._tell(times, share)

    def _tell(self, times: LoadingTimes, share: float) -> None:
        seconds, slowest = times.seconds_a_sample(), times.slowest()
        self._told.add(slowest)
        event = LoaderSlow(rank=self._rank(), sample_s=seconds, waited_share=share, slowest=slowest)
        self._notify(Report(event=event.to_record()))
        self._notify(
            Note(
                key="loader-slow",
                text=f"a sample takes {seconds * 1000:.0f} ms to load, mostly in {slowest}, and"
                f" rank {event.rank} waits for it {share:.0%} of the time: prepare it offline"
                " (trainonce.node keeps it for later runs), or load with more workers",
            )
        )


class LightProfile:
    """Profiles a few seconds of each epoch, and reports where they went.

    Args:
        seconds: How long at most; it ends after three steps as well.
        loops: Knows the epoch.
        rank: Returns this rank; only rank 0 profiles.
        notify: Sends a message to the launcher.
    """

    def __init__(
        self,
        seconds: float,
        loops: Loops,
        rank: Callable[[], int],
        notify: Callable[..., object],
    ) -> None:
        self._seconds = seconds
        self._loops = loops
        self._rank = rank
        self._notify = notify
        self._epoch: int | None = None
        self._steps_in_epoch = 0
        self._profile: Any = None
        self._begun_s = 0.0
        self._steps = 0
        self._commits = 0
        self._off = False

    def after_commit(self) -> None:
        """Begin or end a profile."""
        self._commits += 1
        if self._off or self._rank() != 0:
            return
        if self._profile is not None:
            self._steps += 1
            spent_s = time.monotonic() - self._begun_s
            if spent_s >= self._seconds or self._steps >= _MAX_PROFILED_STEPS:
                self._end(spent_s)
            return
        epoch = self._loops.current_epoch
        if epoch != self._epoch:
            self._epoch, self._steps_in_epoch = epoch, 0
        self._steps_in_epoch += 1
        if self._steps_in_epoch == _SETTLED_STEPS:
            self._begin()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profile = torch.profiler.profile(activities=activities)
        try:
            profile.start()
        except RuntimeError as error:  # the script profiles itself
            self._off = True
            self._notify(Note(key="profile", text=f"no light profile: {error}"))
            return
        self._profile, self._begun_s, self._steps = profile, time.monotonic(), 0

    def _end(self, spent_s: float) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        rows = list(profile.key_averages())
        device = torch.cuda.is_available()
        spent = {
            row.key: float(row.self_device_time_total if device else row.self_cpu_time_total)
            for row in rows
        }
        whole = sum(spent.values()) or 1.0
        top = sorted(spent, key=lambda name: -spent[name])[:_TOP]
        event = HotSpots(
            rank=0, step=self._commits, steps=self._steps, seconds=spent_s,
            epoch=self._epoch or 0, on_device=device,
            spots=[[name[:120], spent[name] / whole] for name in top],
        )  # fmt: skip
        self._notify(Report(event=event.to_record()))
