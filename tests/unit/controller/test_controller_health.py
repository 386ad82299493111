"""Health signals and drains on the bench: what moves, what is only told, what the guard refuses."""

import pytest

from trainonce.controller.drain import Drain as DrainRequest
from trainonce.controller.health import Health
from trainonce.errors import ConfigError
from trainonce.fleet.feed import Finding, HealthSettings, News
from trainonce.fleet.health import Action, Verdict
from trainonce.wire.messages import Drain, Generation, Hello


class FakeFeed:
    """Hands over what a test puts in."""

    def __init__(self):
        self.news = News()

    def start(self):
        pass

    def close(self):
        pass

    def take(self):
        news, self.news = self.news, News()
        return news


class Watched:
    """A bench with health signals."""

    def __init__(self, bench, **settings):
        self.feed = FakeFeed()
        supervisor = bench.supervisor
        self.health = Health(bench.job, supervisor.migration, self.feed, HealthSettings(**settings))
        supervisor.health = self.health
        self.bench = bench

    def find(self, device, action, reason="it is bad", host="here"):
        self.feed.news.findings.append(
            Finding(host=host, device=device, verdict=Verdict(action, (reason,)))
        )
        self.bench.step(0.3)


def finish_move(bench, rank, worker):
    """Let the rank that was told to drain do so, and the job go on."""
    process = bench.drain(rank)
    assert process.worker == worker
    bench.form(bench.job.step)
    process.end()
    bench.step()
    bench.commit(bench.job.step + 1)


def test_rank_on_a_failing_device_is_moved_to_a_spare_and_the_incident_says_why(bench):
    b = bench(spares=1).ready()
    watched = Watched(b)
    watched.find("worker1", Action.MIGRATE, "91 °C and rising")
    spare = b.job.spares()[0].worker
    finish_move(b, rank=1, worker=1)
    (incident,) = b.of_kind("incident")
    assert (incident.cause, incident.detected_by, incident.planned) == ("migration", "health", True)
    assert incident.detail == "91 °C and rising"
    assert b.job.membership.workers == (0, spare)
    (changed,) = b.of_kind("health_changed")
    assert (changed.device, changed.action, changed.ranks) == ("worker1", "migrate", [1])
    assert any("moved away from a device that will fail" in line for line in b.lines)


def test_gpu_is_known_by_its_address(bench):
    b = bench(spares=1).ready()
    for worker in (0, 1):
        process = b.engine.started[worker]
        process.say(Hello(worker=worker, pid=process.pid, device=f"0000:3{worker}:00"))
    b.step()
    watched = Watched(b)
    watched.feed.news.pci = {"0000:30:00": "gpu0", "0000:31:00": "gpu1"}
    watched.find("gpu0", Action.MIGRATE)
    assert b.rank(0).heard(Drain)
    watched.find("pci:0000:31:00", Action.SUSPECT)
    assert not b.rank(1).heard(Drain)


@pytest.mark.parametrize("action", [Action.NOTE, Action.SUSPECT])
def test_less_than_fatal_is_told_and_moves_nothing(bench, action):
    b = bench(spares=1).ready()
    Watched(b).find("worker1", action, "30 replays an hour")
    assert not b.rank(1).heard(Drain)
    (changed,) = b.of_kind("health_changed")
    assert changed.action == action.name.lower()
    assert any("30 replays" in line for line in b.lines) is (action is Action.SUSPECT)


@pytest.mark.parametrize(
    ("device", "host"),
    [("worker7", "here"), ("worker1", "elsewhere"), ("gpu1", "here"), ("", "here")],
)
def test_device_that_no_rank_holds_moves_nothing(bench, device, host):
    b = bench(spares=1).ready()
    Watched(b).find(device, Action.MIGRATE, host=host)
    assert not any(b.rank(rank).heard(Drain) for rank in (0, 1))


def test_verdict_that_flutters_is_told_once(bench):
    b = bench(spares=1).ready()
    watched = Watched(b)
    for _ in range(20):
        watched.find("worker1", Action.SUSPECT)
        watched.find("worker1", Action.NONE)
    assert len(b.of_kind("health_changed")) == 2
    b.clock.advance(700)
    watched.find("worker1", Action.SUSPECT)
    assert len(b.of_kind("health_changed")) == 3


def test_guard_keeps_spares_back_and_says_so_once(bench):
    b = bench(spares=1).ready()
    watched = Watched(b, keep_spares=1)
    watched.find("worker1", Action.MIGRATE)
    for _ in range(5):
        b.step(0.3)
    assert not b.rank(1).heard(Drain)
    said = [line for line in b.lines if "stays on" in line]
    assert said == ["rank 1 stays on worker1: 1 spares are ready and 1 kept for failures"]


def test_moving_can_be_switched_off(bench):
    b = bench(spares=1).ready()
    Watched(b, move=False).find("worker1", Action.MIGRATE)
    assert not b.rank(1).heard(Drain)
    assert any("moving is switched off" in line for line in b.lines)


def test_second_failing_device_waits_until_the_job_has_rested(bench):
    b = bench(nproc=3, spares=1).ready()
    watched = Watched(b, rest_s=60)
    watched.find("worker1", Action.MIGRATE)
    finish_move(b, rank=1, worker=1)
    b.step(2)
    b.park()
    watched.find("worker2", Action.MIGRATE)
    assert not b.rank(2).heard(Drain)
    b.step(61)
    assert b.rank(2).heard(Drain)


def test_spare_on_a_suspected_device_is_the_last_to_be_promoted(bench):
    b = bench(spares=2).ready()
    watched = Watched(b)
    first, second = (handle.worker for handle in b.job.spares())
    watched.find(f"worker{first}", Action.SUSPECT)
    b.rank(1).end(signum=9)
    b.step()
    assert b.job.membership.workers == (0, second)


def test_nothing_is_moved_to_a_spare_on_a_suspected_device(bench):
    b = bench(spares=1).ready()
    watched = Watched(b)
    watched.find(f"worker{b.job.spares()[0].worker}", Action.SUSPECT)
    watched.find("worker1", Action.MIGRATE)
    assert not b.rank(1).heard(Drain)
    assert any("0 spares are ready" in line for line in b.lines)


def test_source_that_was_asked_for_and_is_missing_is_told_and_auto_is_not(bench):
    b = bench().ready()
    watched = Watched(b, sources=("nvml", "auto"))
    watched.feed.news.missing = {"nvml": "NVML is not read: no driver", "amd": "no amdsmi"}
    b.step(0.3)
    assert "note: NVML is not read: no driver" in b.lines
    assert not any("amdsmi" in line for line in b.lines)


def test_use_of_the_ranks_devices_is_in_the_progress_until_nobody_tells_it_any_more(bench):
    b = bench(spares=1).ready()
    watched = Watched(b)
    spare = b.job.spares()[0].worker
    watched.feed.news.use = {
        ("here", "worker0"): 0.5, ("here", "worker1"): 0.9, ("here", f"worker{spare}"): 0.0,
        ("elsewhere", "worker1"): 0.0,
    }  # fmt: skip
    b.step(0.3)
    b.step(6)
    assert b.of_kind("progress")[-1].device_use == pytest.approx(0.7)
    b.step(61)
    assert b.of_kind("progress")[-1].device_use is None


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="every 0 s"):
        HealthSettings(every_s=0)
    with pytest.raises(ConfigError, match="no source"):
        HealthSettings(sources=("thermometer",))
    with pytest.raises(ConfigError, match="limits of moves"):
        HealthSettings(per_h=0)


# -- draining


def drain(bench, host, device="", **options):
    answers = []
    DrainRequest(bench.supervisor, host, device, **options).run(
        lambda ok, text: answers.append((ok, text))
    )
    bench.step()
    return answers


def test_host_is_drained_rank_by_rank_to_another_host(bench):
    b = bench(nproc=2, spares=2)
    for process in b.engine.started[:2]:
        process.host = "old"
    b.ready()
    b.job.holder(0).process.host = "old"
    answers = drain(b, "old")
    for rank in (0, 1):
        assert answers == []
        finish_move(b, rank, b.job.membership.workers[rank])
        b.step(1)
        b.park()
    assert answers == [(True, "2 of 2 ranks moved away from old")]
    assert {handle.host for handle in b.job.ranked()} == {"here"}


def test_host_without_another_is_not_drained_and_the_way_out_is_named(bench):
    b = bench(spares=1).ready()
    ((ok, text),) = drain(b, "here")
    assert not ok
    assert "no other host" in text
    assert "--checkpoint" in text
    ((ok, text),) = drain(b, "here", checkpoint=True)
    assert ok
    assert "--resume j" in text
    assert b.job.stopping


def test_device_is_drained_to_a_spare_that_is_elsewhere(bench):
    b = bench(spares=1).ready()
    answers = drain(b, "here", "worker0")
    finish_move(b, 0, 0)
    assert answers == [(True, "1 of 1 ranks moved away from worker0 of here")]
    assert b.of_kind("incident")[0].detail == "worker0 of here is drained"


def test_host_and_device_without_ranks_get_a_clear_word(bench):
    b = bench(spares=1).ready()
    assert drain(b, "moon") == [(False, "no worker of job j runs on moon: they run on here")]
    told = "no rank of job j is on worker9 of here: they are on slot0, slot1"
    assert drain(b, "here", "worker9") == [(True, told)]


def test_rank_that_dies_while_it_is_drained_is_said(bench):
    b = bench(spares=1).ready()
    answers = drain(b, "here", "worker1")
    b.rank(1).end(signum=9)
    b.step()
    ((ok, text),) = answers
    assert not ok
    assert "died before it could move" in text
    assert b.rank(0).heard(Generation)
