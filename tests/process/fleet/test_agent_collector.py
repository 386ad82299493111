"""Agents and a collector as real processes: what dies or lies harms nobody else."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import trainonce

ENV = {**os.environ, "PYTHONPATH": str(Path(trainonce.__file__).parents[1]), "NO_COLOR": "1"}
TOKEN = "a secret of enough characters"


class Fleet:
    """Starts `trainonce fleet` processes, and asks the collector."""

    def __init__(self, folder):
        self.env = {**ENV, "TRAINONCE_HOME": str(folder)}
        self.token = folder / "token"
        self.token.write_text(TOKEN)
        self.processes = []
        self.port = 0

    def start(self, *args):
        process = subprocess.Popen(
            [sys.executable, "-m", "trainonce.cli.main", "fleet", *map(str, args)],
            env=self.env, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def collector(self, *options):
        process = self.start("collector", "--port", self.port, "--token-file", self.token, *options)
        line = process.stderr.readline()
        assert "collecting on" in line, line + process.stderr.read()
        self.url = line.partition("collecting on ")[2].partition(",")[0]
        self.port = int(self.url.rpartition(":")[2])
        return process

    def agent(self, host, *options):
        return self.start(
            "agent", self.url, "--host", host, "--sources", "host", "--every-s", "0.3",
            "--token-file", self.token, *options,
        )  # fmt: skip

    def ask(self, path="/metrics", token=TOKEN, data=None, context=None):
        request = urllib.request.Request(self.url + path, data=data)
        request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, context=context) as answer:
            return answer.read().decode()

    def status(self, **kwargs):
        try:
            self.ask(**kwargs)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except urllib.error.URLError as error:
            # The answer to a message that is too large may come before all of it was sent.
            if not isinstance(error.reason, BrokenPipeError | ConnectionResetError):
                raise
            return "cut off"
        return 200

    def metric(self, name, **labels):
        for family in text_string_to_metric_families(self.ask()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return None

    def until(self, holds):
        """Ask again and again; pytest's time-out is the limit."""
        while not holds():
            for process in self.processes:
                assert process.poll() in (None, -signal.SIGKILL), process.stderr.read()
            time.sleep(0.02)

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            if not process.stderr.closed:
                process.communicate()


@pytest.fixture
def fleet(tmp_path):
    one = Fleet(tmp_path)
    yield one
    one.close()


def line_with(process, text):
    for line in process.stderr:
        if text in line:
            return line
    raise EOFError(f"it ended without saying {text!r}")


def test_dead_agent_and_dead_collector_harm_nobody(fleet):
    collector = fleet.collector("--stale-s", "2")
    one, two = fleet.agent("host-1"), fleet.agent("host-2")
    for host in ("host-1", "host-2"):
        fleet.until(lambda host=host: fleet.metric("trainonce_host_up", host=host) == 1)
    assert 0 < fleet.metric("trainonce_host_memory_free_ratio", host="host-1") < 1
    one.kill()
    fleet.until(lambda: fleet.metric("trainonce_host_up", host="host-1") == 0)
    assert fleet.metric("trainonce_host_up", host="host-2") == 1

    collector.kill()
    collector.wait()
    line_with(two, "does not take reports")
    fleet.collector("--stale-s", "2")
    line_with(two, "takes reports again")
    fleet.until(lambda: fleet.metric("trainonce_host_up", host="host-2") == 1)
    two.send_signal(signal.SIGTERM)
    assert two.wait() == 0


def test_liars_and_stallers_are_refused_and_the_others_are_still_served(fleet):
    collector = fleet.collector("--stale-s", "3600")
    fleet.agent("honest")
    fleet.until(lambda: fleet.metric("trainonce_host_up", host="honest") == 1)
    report = {
        "format": "trainonce-host-1", "host": "liar", "readings": [], "verdicts": [], "jobs": [],
        "missing": {},
    }  # fmt: skip

    # Clients that say nothing, or something without an end; from other addresses, too.
    stalling = []
    for number in range(40):
        client = socket.create_connection(
            ("127.0.0.1", fleet.port), source_address=(f"127.0.0.{2 + number % 3}", 0)
        )
        client.sendall(b"POST /v1/report HTTP/1.1\r\nX: " * (number % 2))
        stalling.append(client)

    def post(data, **kwargs):
        return fleet.status(path="/v1/report", data=data, **kwargs)

    good = json.dumps(report).encode()
    assert post(good, token="wrong") == 401
    assert fleet.status(token="wrong") == 401
    assert fleet.status(path="/healthz", token="wrong") == 200
    assert post(b"x" * (1 << 20) + b"x") in (413, "cut off")
    assert post(b"not json") == 422
    assert post(good.replace(b'"liar"', b'"li\\nar"')) == 422
    bad = {**report, "readings": [{"mono_s": 1.0, "device": "gpu0", "temperature_c": 1e300}]}
    assert post(json.dumps(bad).encode()) == 422
    assert post(json.dumps({**bad, "readings": [{"mono_s": 1.0}] * 1000}).encode()) == 422
    assert fleet.status(path="/v1/other", data=good) == 400
    # A liar with the right token, from another address, in the name of the honest host.
    stolen = json.dumps({**report, "host": "honest"})
    with socket.create_connection(
        ("127.0.0.1", fleet.port), source_address=("127.0.0.9", 0)
    ) as client:
        client.sendall(
            f"POST /v1/report HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Length: {len(stolen)}\r\n\r\n{stolen}".encode()
        )
        assert b" 409 " in client.makefile("rb").readline()
    taken = fleet.metric("trainonce_collector_reports_total")
    fleet.until(lambda: fleet.metric("trainonce_collector_reports_total") > taken)
    assert fleet.metric("trainonce_host_up", host="honest") == 1
    assert fleet.metric("trainonce_host_memory_free_ratio", host="honest") > 0
    for reason, least in (("token", 2), ("size", 1), ("content", 4), ("impostor", 1)):
        count = fleet.metric("trainonce_collector_rejected_total", reason=reason)
        assert count >= least, reason
    for client in stalling:
        client.close()
    collector.send_signal(signal.SIGTERM)
    assert collector.wait() == 0


def test_agent_with_a_wrong_token_says_so_and_tries_on(fleet, tmp_path):
    fleet.collector()
    wrong = tmp_path / "wrong"
    wrong.write_text("another secret of enough characters")
    agent = fleet.agent("h", "--token-file", wrong)
    assert "HTTP 401: the token is missing or wrong" in line_with(agent, "does not take reports")
    assert agent.poll() is None


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_reports_go_over_tls_with_a_certificate_of_ones_own(fleet, tmp_path):
    import ssl

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    fleet.collector("--tls-cert", certificate, "--tls-key", key)
    assert fleet.url.startswith("https://")
    with socket.create_connection(("127.0.0.1", fleet.port)):  # stalls its handshake
        untrusting = fleet.agent("h")
        assert "CERTIFICATE_VERIFY_FAILED" in line_with(untrusting, "does not take reports")
        untrusting.kill()
        fleet.agent("h", "--tls-ca", certificate)
        trusting = ssl.create_default_context(cafile=str(certificate))
        fleet.until(lambda: 'trainonce_host_up{host="h"} 1.0' in fleet.ask(context=trusting))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("collector", "--listen", "0.0.0.0"), "needs a token"),
        (("collector", "--tls-key", "x"), "belong together"),
        (("agent", "http://collector:9420"), "needs a token"),
        (("agent", "collector"), "is no URL"),
        (("agent", "http://127.0.0.1:1", "--sources", "x"), "no source of health signals"),
    ],
)
def test_unusable_options_are_one_line_and_exit_code_2(fleet, args, says):
    process = fleet.start(*args)
    err = process.communicate()[1]
    assert process.returncode == 2
    assert says in err.splitlines()[0]
