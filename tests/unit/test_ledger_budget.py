"""Budgets: when an alert is due, and that it arrives."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from trainonce.cli.main import main
from trainonce.ledger.budget import BudgetWatch, post
from trainonce.ledger.prices import BudgetSettings, EconomicsSettings
from trainonce.ledger.report import build

from .ledger_jobs import begin, golden_job, progress, write

BUDGET = BudgetSettings(name="b", metric="cost_usd", limit=100.0, thresholds=(0.5, 1.0))


class Receiver(HTTPServer):
    """Keeps what was posted; answers with the statuses it was given, then 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict] = []
        self.statuses: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(json.loads(body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def crossed(watch: BudgetWatch, used: float | None, job: str = "j") -> list[float]:
    return [alert.event.threshold for alert in watch.observe(job, "p", {"cost_usd": used})]


def test_each_threshold_alerts_once_for_each_job() -> None:
    watch = BudgetWatch([BUDGET])
    assert crossed(watch, None) == []
    assert crossed(watch, 49.9) == []
    assert crossed(watch, 50.0) == [0.5]
    assert crossed(watch, 75.0) == []
    assert crossed(watch, 130.0) == [1.0]
    assert crossed(watch, 140.0) == []
    assert crossed(watch, 140.0, "other") == [0.5, 1.0]


def test_a_use_that_flutters_does_not_alert_again_until_it_fell_clearly() -> None:
    watch = BudgetWatch([BUDGET])
    assert crossed(watch, 50.0) == [0.5]
    assert crossed(watch, 45.1) == []
    assert crossed(watch, 51.0) == []
    assert crossed(watch, 44.9) == []
    assert crossed(watch, 51.0) == [0.5]


def test_a_restarted_watch_remembers_what_the_ledger_holds() -> None:
    (alert,) = BudgetWatch([BUDGET]).observe("j", "p", {"cost_usd": 60.0})
    assert crossed(BudgetWatch([BUDGET], [("j", alert.event)]), 60.0) == []


def test_a_budget_of_another_project_does_not_apply() -> None:
    other = BudgetSettings(name="b", metric="cost_usd", limit=1.0, project="other")
    assert crossed(BudgetWatch([other]), 60.0) == []


def test_the_webhook_gets_the_alert_also_after_a_passing_error(receiver: Receiver) -> None:
    receiver.statuses = [503]
    budget = BudgetSettings(name="b", metric="cost_usd", limit=10.0, webhook=receiver.url)
    alert = BudgetWatch([budget]).observe("j", "p", {"cost_usd": 5.0})[0]
    said: list[str] = []
    thread = post(alert, said.append)
    assert thread is not None
    thread.join()
    assert said == []
    assert len(receiver.bodies) == 2
    body = receiver.bodies[-1]
    assert (body["job"], body["kind"], body["threshold"]) == ("j", "budget_crossed", 0.5)


def test_a_webhook_that_refuses_or_is_gone_is_told_once(receiver: Receiver) -> None:
    said: list[str] = []
    receiver.statuses = [404]
    for url in (receiver.url, "http://127.0.0.1:9/closed"):
        budget = BudgetSettings(name="b", metric="cost_usd", limit=10.0, webhook=url)
        thread = post(BudgetWatch([budget]).observe("j", "p", {"cost_usd": 5.0})[0], said.append)
        assert thread is not None
        thread.join()
    assert len(said) == 2
    assert "HTTP 404" in said[0]
    assert len(receiver.bodies) == 1


def test_an_alert_long_after_a_job_was_lost_does_not_lengthen_it(tmp_path: Path) -> None:
    alert = BudgetWatch([BUDGET]).observe("j", "p", {"cost_usd": 50.0})[0]
    write(tmp_path, j=[*begin("j"), progress(90, 9)])
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection, connection:
        connection.execute("UPDATE writers SET started = '1'")  # its launcher died
    ledger = write(tmp_path, j=[alert.event])
    (job,) = build(ledger, EconomicsSettings(), 2e9).jobs
    assert (job.facts.summary.outcome, job.facts.elapsed_s) == ("lost", 90.0)
    assert [one.threshold for one in job.facts.crossed] == [0.5]


def test_report_alerts_each_crossed_threshold_once(
    tmp_path: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, golden=golden_job())
    (tmp_path / "settings.toml").write_text(
        "[economics]\nusd_per_gpu_hour = 3\n[[budget]]\nname = 'small'\nmetric = 'cost_usd'\n"
        f"limit = 2\nwebhook = '{receiver.url}'\n"
        "[[budget]]\nname = 'time'\nmetric = 'hours'\nlimit = 0.1\nthresholds = [1.0]\n"
    )
    for _ in range(2):
        assert main(["report", "last", "--home", str(tmp_path), "--alert"]) == 0
    out = capsys.readouterr()
    assert sorted(body["threshold"] for body in receiver.bodies) == [0.5, 0.8]
    assert out.err.count("alert: job golden") == 3
    assert out.err.count("used 0.1111 hours, over 100% of 0.1 (budget time)") == 1
    assert "Budget small: crossed 50.0 % of 2 cost_usd" in out.out
