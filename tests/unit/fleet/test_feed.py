"""The feed: reads on its own thread, keeps what is new, and survives sources that do not."""

import threading

import pytest

from trainonce.clock import FakeClock
from trainonce.errors import SourceError
from trainonce.fleet.feed import Feed, HealthSettings, open_for, read_all
from trainonce.fleet.health import Action
from trainonce.fleet.signals import Reading
from trainonce.fleet.sources.choose import Sources


class Told:
    """A source that a test speaks through."""

    name = "told"

    def __init__(self):
        self.say = lambda: []
        self.asked = threading.Semaphore(0)
        self.pci = {}

    def read(self):
        self.asked.release()
        return self.say()

    def wait(self):
        """Wait until it was asked twice: what it said before has then been judged."""
        while self.asked.acquire(blocking=False):
            pass
        self.asked.acquire()
        self.asked.acquire()


@pytest.fixture
def told():
    source = Told()
    feed = Feed(lambda: Sources(sources=[source], missing={"nvml": "no driver"}), 0.01)
    feed.start()
    yield source, feed
    feed.close()


def test_changes_of_a_verdict_are_handed_over_once(told):
    source, feed = told
    ticks = iter(range(10**9))

    def reading(**values):
        return [Reading(mono_s=float(next(ticks)), host="h", device="gpu0", **values)]

    source.say = lambda: reading(temperature_c=50.0, utilisation=0.9)
    source.wait()
    news = feed.take()
    assert news.findings == []
    assert news.use == {("h", "gpu0"): 0.9}
    source.say = lambda: reading(recovery_action=1)
    source.wait()
    (finding,) = feed.take().findings
    assert (finding.device, finding.verdict.action) == ("gpu0", Action.MIGRATE)
    source.wait()
    assert feed.take().findings == []


def test_source_that_fails_is_told_once_and_read_again(told):
    source, feed = told

    def fail():
        raise SourceError("the exporter does not answer")

    source.say = fail
    source.wait()
    assert feed.take().missing["told"] == "the exporter does not answer"
    source.wait()
    assert feed.take().missing == {}

    def break_down():
        raise ZeroDivisionError("a bug")

    source.say = list
    source.wait()
    source.say = break_down
    source.wait()
    assert "ZeroDivisionError: a bug" in feed.take().missing["told"]


def test_device_of_the_kernel_log_is_the_one_that_the_driver_numbers():
    source = Told()
    source.say = lambda: [
        Reading(mono_s=1, host="h", device="pci:0000:3b:00", xids=(79,)),
        Reading(mono_s=1, host="h", device="pci:0000:ff:00", xids=(79,)),
    ]
    readings, _ = read_all(Sources(sources=[source], pci={"0000:3b:00": "gpu3"}))
    assert [reading.device for reading in readings] == ["gpu3", "pci:0000:ff:00"]


def test_driver_that_never_answers_holds_nobody_up():
    hanging, entered = threading.Event(), threading.Event()
    source = Told()

    def hang():
        entered.set()
        hanging.wait()
        return []

    source.say = hang
    feed = Feed(lambda: Sources(sources=[source]), 0.01)
    feed.start()
    entered.wait()
    assert feed.take().findings == []
    feed.close()  # returns, though the thread does not
    hanging.set()


def test_feed_of_a_host_without_gpus_says_what_is_missing(tmp_path):
    feed = open_for(HealthSettings(every_s=0.01), host="h", clock=FakeClock(), disk=tmp_path)
    feed.start()
    missing: dict[str, str] = {}
    while "nvml" not in missing:
        missing |= feed.take().missing
    feed.close()
    assert "host" not in missing
    assert HealthSettings(sources=("none",)).is_off
