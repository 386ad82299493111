"""Reports, the collector's book and its page: what is believed, and what is not."""

import json
import re
import shutil
import socketserver
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from trainonce.clock import FakeClock
from trainonce.errors import ConfigError, WireError
from trainonce.fleet.collect.agent import Reporter, Sender, run
from trainonce.fleet.collect.book import Book, RefusedError
from trainonce.fleet.collect.collector import Collector
from trainonce.fleet.collect.message import (
    MAX_BYTES,
    MAX_DEVICES,
    DeviceVerdict,
    HostReport,
    JobStatus,
    decode,
)
from trainonce.fleet.collect.metrics import render
from trainonce.fleet.signals import Reading, ScriptedSource
from trainonce.fleet.sources.choose import Sources

MONITORING = Path(__file__).parents[3] / "monitoring"
PROMTOOL = shutil.which("promtool")


def full_report(host="gpu-1"):
    """Return a report in which every field of a reading is known."""
    gpu = Reading(
        mono_s=5.0, host=host, device="gpu0", temperature_c=61.0, slowdown_c=87.0, shutdown_c=92.0,
        throttled_thermal_s=1.5, throttled_brake_s=0.0, utilisation=0.97, recovery_action=0, lost=0,
        row_remap_failed=0, row_remap_pending=1, ecc_uncorrected_total=0, ecc_corrected_total=4,
        nvlink_errors_total=2, pcie_replays_total=1, xids=(31,),
    )  # fmt: skip
    machine = Reading(
        mono_s=5.0, host=host, memory_free_share=0.5, memory_stalled_share=0.0,
        disk_free_share=0.25, link_downed_total=3, kernel_faults=("link_down",),
    )  # fmt: skip
    return HostReport(
        host=host,
        readings=(gpu, machine),
        verdicts=(
            DeviceVerdict(device="gpu0", action="suspect", reasons=("rows wait",)),
            DeviceVerdict(device="", action="none"),
        ),
        jobs=(JobStatus(job="1120-x", step=400, ranks=8, spares_ready=1, incidents=2),),
        missing={"amd": "amdsmi is not installed"},
    )


def raw(**changes):
    return json.dumps({**json.loads(full_report().encode()), **changes}).encode()


@pytest.fixture
def clock():
    return FakeClock()


# -- messages


def test_report_comes_back_as_it_was_sent():
    assert decode(full_report().encode()) == full_report()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        raw(format="trainonce-host-2"),
        raw(host=""),
        raw(host='a"} 1\nevil{x="'),
        raw(host="h" * 200),
        raw(host=7),
        raw(readings={}),
        raw(readings=[{"mono_s": 1.0, "device": "gpu0", "colour": 3}]),
        raw(readings=[{"mono_s": "soon"}]),
        raw(readings=[{"mono_s": 1.0, "device": "gpu 0\n"}]),
        raw(readings=[{"mono_s": 1.0, "temperature_c": 1e300}]),
        raw(readings=[{"mono_s": 1.0}] * (MAX_DEVICES + 1)),
        raw(verdicts=[{"device": "gpu0", "action": "explode", "reasons": []}]),
        raw(verdicts=[{"device": "gpu0", "action": "note", "reasons": ["x"] * 100}]),
        raw(jobs=[{"job": "j", "step": -1, "ranks": 1, "spares_ready": 0, "incidents": 0}]),
        raw(jobs=[{"job": "j", "step": 1e400, "ranks": 1, "spares_ready": 0, "incidents": 0}]),
        raw(jobs=[{"job": "j", "step": True, "ranks": 1, "spares_ready": 0, "incidents": 0}]),
        raw(missing=["nvml"]),
        raw(readings=[{"mono_s": 1.0, "xids": "79"}]),
        raw(readings=[{"mono_s": 1.0, "temperature_c": 10**400}]),
        raw().replace(b"[31]", b"79"),
        b" " * (MAX_BYTES + 1),
    ],
)
def test_what_is_no_report_is_refused(data):
    with pytest.raises(WireError):
        decode(data)


def test_a_bad_sensor_does_not_hide_the_others():
    (reading,) = decode(raw(readings=[{"mono_s": 1.0, "temperature_c": -5, "lost": 1}])).readings
    assert (reading.temperature_c, reading.lost) == (None, 1)


def test_numbers_that_no_float_can_hold_are_not_known():
    data = raw().replace(b"61.0", b"1e999").replace(b"[31]", b"[1e999, 31, true]")
    reading = decode(data).readings[0]
    assert (reading.temperature_c, reading.xids) == (None, (31,))


def test_readings_of_another_host_become_those_of_the_sender():
    (reading,) = decode(raw(readings=[{"mono_s": 1.0, "host": "victim"}])).readings
    assert reading.host == "gpu-1"


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    st.sampled_from(["host", "readings", "verdicts", "jobs", "missing", "format"]),
)
def test_no_value_in_any_place_does_more_than_be_refused(value, place):
    try:
        report = decode(raw(**{place: value}))
    except WireError:
        return
    book = Book(FakeClock())
    book.take(report.encode(), "10.0.0.1")
    list(text_string_to_metric_families(render(book)))


# -- the book


def take(book, host="gpu-1", address="10.0.0.1"):
    book.take(full_report(host).encode(), address)


def refused(book, *args, **kwargs):
    with pytest.raises(RefusedError) as caught:
        take(book, *args, **kwargs)
    return caught.value.reason


def test_name_of_a_host_belongs_to_the_address_that_reports_it(clock):
    book = Book(clock)
    take(book)
    clock.advance(10)
    assert refused(book, address="10.0.0.66") == "impostor"
    take(book)
    clock.advance(61)  # the host went silent: it may have moved
    take(book, address="10.0.0.66")


def test_reports_that_come_too_fast_and_hosts_that_are_too_many_are_refused(clock):
    book = Book(clock, max_hosts=2, forget_s=100)
    take(book, "a")
    assert refused(book, "a") == "rate"
    take(book, "b", "10.0.0.2")
    assert refused(book, "c", "10.0.0.3") == "full"
    clock.advance(101)
    take(book, "c", "10.0.0.3")
    assert [entry.report.host for entry in book.entries()] == ["c"]


def test_silent_host_is_down_and_what_it_said_is_no_longer_shown(clock):
    book = Book(clock)
    take(book)
    assert 'trainonce_host_up{host="gpu-1"} 1.0' in render(book)
    clock.advance(60)
    page = render(book)
    assert 'trainonce_host_up{host="gpu-1"} 0.0' in page
    assert "temperature" not in page


# -- the page


def page():
    book = Book(FakeClock(1.7e9))
    take(book)
    take(book, "gpu-2", "10.0.0.2")
    book.refuse("token")
    return render(book)


def test_page_is_what_prometheus_reads():
    families = {family.name: family for family in text_string_to_metric_families(page())}
    assert len(families) > 20
    temperature = families["trainonce_device_temperature_celsius"]
    assert [(s.labels, s.value) for s in temperature.samples] == [
        ({"host": host, "device": "gpu0"}, 61.0) for host in ("gpu-1", "gpu-2")
    ]
    verdicts = families["trainonce_health_verdict"].samples
    assert {(s.labels["device"], s.value) for s in verdicts} == {("gpu0", 2.0), ("host", 0.0)}
    rejected = families["trainonce_collector_rejected"].samples
    assert sum(sample.value for sample in rejected) == 1
    for family in families.values():
        assert family.documentation.endswith(".")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_page_is_clean_for_promtool():
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=page(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_alert_rules_are_clean_for_promtool_and_fire_when_they_should():
    for what in (("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")):
        done = subprocess.run([PROMTOOL, *what], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def shown_metrics():
    found = set()
    for family in text_string_to_metric_families(page()):
        found |= {sample.name for sample in family.samples}
    return found


@pytest.mark.parametrize("name", ["alerts.yml", "grafana-dashboard.json"])
def test_every_metric_of_dashboard_and_alerts_is_one_that_the_page_shows(name):
    used = set(re.findall(r"\btrainonce_\w+", (MONITORING / name).read_text()))
    assert len(used) >= 8
    assert used - shown_metrics() == set()


def test_dashboard_fits_the_schema_of_grafana():
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def through_the_schema(document):
        return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(document)))

    told = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    missing = list(lost(told, through_the_schema(told)))
    assert missing == [], "the schema knows no such fields, or takes them otherwise"
    misspelt = json.loads(json.dumps(told).replace('"gridPos"', '"gridpos"'))
    assert list(lost(misspelt, through_the_schema(misspelt)))
    assert len({panel["id"] for panel in told["panels"]}) == len(told["panels"])
    for panel in told["panels"]:
        place = panel["gridPos"]
        assert 0 < place["w"] <= 24 - place["x"]


def lost(told, read, path="$"):
    """Yield where a document lost something when it went through the schema's types."""
    if isinstance(told, dict):
        for key, value in told.items():
            if not isinstance(read, dict) or key not in read:
                yield f"{path}.{key}"
            else:
                yield from lost(value, read[key], f"{path}.{key}")
    elif isinstance(told, list):
        for index, value in enumerate(told):
            there = read[index] if isinstance(read, list) and index < len(read) else None
            yield from lost(value, there, f"{path}[{index}]")
    elif told != read:
        yield f"{path}: {told!r} became {read!r}"


# -- agent


def test_reporter_tells_verdicts_and_what_is_missing():
    readings = [
        [Reading(mono_s=float(i), host="h", device="gpu0", recovery_action=1)] for i in (1, 2)
    ]
    sources = Sources(sources=[ScriptedSource(readings)], missing={"amd": "none here"})
    clock = FakeClock()
    reporter = Reporter("h", sources, list, clock)
    reporter.report()
    report = reporter.report()
    assert [reading.mono_s for reading in report.readings] == [2.0]
    assert report.verdicts[0].action == "migrate"
    assert decode(report.encode()) == report
    assert reporter.report().readings == report.readings  # nothing new: the last ones stand
    clock.advance(601)
    silent = reporter.report()
    assert (silent.readings, silent.verdicts) == ((), ())  # but not for ever


def test_name_that_no_collector_would_take_is_refused_at_once():
    with pytest.raises(ConfigError, match="'a b' is no name of a host"):
        Reporter("a b", Sources(), list, FakeClock())


def test_two_sources_of_one_device_do_not_hide_each_other():
    driver = Reading(mono_s=1.0, host="h", device="gpu0", temperature_c=61.0, xids=(31,))
    log = Reading(mono_s=1.1, host="h", device="gpu0", xids=(13,))
    sources = Sources(sources=[ScriptedSource([[driver]]), ScriptedSource([[log]])])
    (reading,) = Reporter("h", sources, list, FakeClock()).report().readings
    assert (reading.mono_s, reading.temperature_c, reading.xids) == (1.1, 61.0, (31, 13))


def test_reporter_keeps_the_latest_devices_where_there_are_too_many():
    batches = [
        [Reading(mono_s=at, host="h", device=f"d{i}") for i in range(first, first + MAX_DEVICES)]
        for at, first in ((1.0, 0), (2.0, 100))
    ]
    clock = FakeClock()
    reporter = Reporter("h", Sources(sources=[ScriptedSource(batches)]), list, clock)
    reporter.report()
    clock.advance(10)
    report = reporter.report()
    assert {reading.device for reading in report.readings} == {
        f"d{i}" for i in range(100, 100 + MAX_DEVICES)
    }
    assert decode(report.encode()) == report


def test_agent_waits_longer_and_longer_for_a_collector_that_is_gone_and_says_so_once():
    class Fails:
        def __init__(self, *answers):
            self.answers = list(answers)

        def send(self, report):
            return self.answers.pop(0)

    sender = Fails("", "no route", "no route", "no route", "", "")
    waits, said = [], []

    def wait(delay_s):
        waits.append(delay_s)
        return not sender.answers

    run(
        Reporter("h", Sources(), list, FakeClock()), sender, every_s=1.0, wait=wait, say=said.append
    )
    assert [round(delay_s) for delay_s in waits][:1] == [1]
    assert waits[1] >= 1.6
    assert waits[3] >= 2 * waits[1] / 1.5
    assert waits[4:] == [1.0, 1.0]
    assert [line.partition(":")[0] for line in said] == [
        "the collector does not take reports", "the collector takes reports again",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        b"220 smtp ready\r\n",
        b"HTTP/1.1 500 x\r\nContent-Length: 99\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200,
        b"",
    ],
)
def test_whatever_answers_instead_of_a_collector_ends_no_agent(answer):
    class Server(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        said = Sender(f"http://127.0.0.1:{server.server_address[1]}").send(full_report())
        thread.join()
    assert said


@pytest.mark.parametrize(
    ("url", "token", "says"),
    [
        ("http://127.example.org:9420", "", "needs a token"),
        ("collector:9420", "", "is no URL"),
        ("ftp://collector", "", "is no URL"),
        ("http://127.0.0.1:port", "", "is no URL"),
        ("http://[::1", "", "is no URL"),
        ("http://10.0.0.1:9420", "", "needs a token"),
    ],
)
def test_agent_refuses_what_cannot_be_a_collector(url, token, says):
    with pytest.raises(ConfigError, match=says):
        Sender(url, token=token)


@pytest.mark.parametrize("address", [("127.0.0.1", 10**6), ("127.0.0.1", -1), ("a..b", 0)])
def test_collector_that_cannot_listen_says_so(address):
    with pytest.raises(ConfigError, match=f"cannot listen on {address[0]}:{address[1]}"):
        Collector(address, Book(FakeClock()), token="0123456789abcdef")


def test_collector_listens_beyond_loopback_only_with_a_token():
    with pytest.raises(ConfigError, match="needs a token"):
        Collector(("0.0.0.0", 0), Book(FakeClock()))
    with pytest.raises(ConfigError, match="no certificate"):
        Collector(("127.0.0.1", 0), Book(FakeClock()), tls=(Path("none"), Path("none")))
