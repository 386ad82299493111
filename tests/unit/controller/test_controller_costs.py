"""What a job uses while it runs: energy events, budgets, and the webhook that hears of them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from trainonce.controller.costs import Costs, EnergyThread
from trainonce.ledger.prices import BudgetSettings, EconomicsSettings, Prices

HOUR_S = 3600.0


class StepMeter:
    """Ten joules more at each reading."""

    source, is_estimate = "nvml", False

    def __init__(self):
        self.j = 0.0

    def read_j(self):
        self.j += 10.0
        return self.j


class Still:
    """In place of the energy thread: what a test puts in."""

    def __init__(self, *events):
        self.events = list(events)

    def start(self):
        pass

    def finish(self):
        pass

    def take(self):
        taken, self.events = self.events, []
        return taken


@pytest.fixture
def hook():
    """A real webhook on loopback; `bodies` is what came."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.bodies = []
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def costs_of(bench, energy=None, prices=None, **kwargs):
    budgets = kwargs.pop("budgets", ())
    costs = Costs(
        bench.job, bench.supervisor.ending,
        economics=EconomicsSettings(prices=prices or Prices(usd_per_gpu_hour=2.0), budgets=budgets),
        project="p", energy=energy or Still(), **kwargs,
    )  # fmt: skip
    bench.supervisor.costs = costs
    costs.start()
    return costs


def test_each_threshold_is_told_once_and_reaches_ledger_and_webhook(bench, hook):
    b = bench(nproc=2, spares=1).ready()
    budget = BudgetSettings(name="b", metric="cost_usd", limit=6.0, webhook=hook.url)
    costs = costs_of(b, budgets=(budget,))
    for _ in range(60):  # 3 GPUs at $2 an hour reach $6 after an hour
        b.step(60)
    costs.close()
    told = [event.threshold for event in b.of_kind("budget_crossed")]
    assert told == [0.5, 0.8, 1.0]
    assert [body["threshold"] for body in hook.bodies] == told
    assert {body["job"] for body in hook.bodies} == {"j"}
    assert sum("budget b:" in line for line in b.lines) == 3
    assert not b.job.stopping


def test_job_ends_with_a_checkpoint_at_its_budget_if_that_was_asked_for(bench):
    b = bench().ready()
    costs_of(b, budgets=(BudgetSettings(name="b", metric="gpu_hours", limit=1.0, stop=True),))
    b.step(0.4 * HOUR_S)
    assert not b.job.stopping
    b.step(0.2 * HOUR_S)
    assert b.job.stopping
    assert any("the budget is spent" in line for line in b.lines)


def test_thresholds_that_an_earlier_part_crossed_are_not_told_again(bench):
    b = bench().ready()
    budget = BudgetSettings(name="b", metric="gpu_hours", limit=1.0)
    costs_of(b, budgets=(budget,))
    b.step(0.5 * HOUR_S)
    crossed = b.of_kind("budget_crossed")
    assert crossed
    again = costs_of(b, budgets=(budget,), crossed=crossed)
    b.events.clear()
    again._begun_s -= 0.5 * HOUR_S
    again.look()
    assert b.of_kind("budget_crossed") == []


def test_energy_is_measured_and_counts_with_the_facilitys_share(bench):
    b = bench().ready()
    energy = EnergyThread(StepMeter, every_s=0.001)
    costs = costs_of(b, energy=energy, prices=Prices(pue=1.5))
    found = []
    while len(found) < 3:
        found = b.of_kind("energy_used")
        b.step(2)
    costs.finish()
    events = b.of_kind("energy_used")
    assert all(e.energy_j == 10.0 and e.source == "nvml" and not e.is_estimate for e in events)
    assert costs.used()["energy_kwh"] == pytest.approx(10.0 * len(events) * 1.5 / 3.6e6)


def test_without_a_meter_energy_is_estimated_as_the_report_does(bench):
    b = bench(nproc=2).ready()
    costs = costs_of(b, prices=Prices(gpu_tdp_w=500.0, pue=1.2))
    b.step(HOUR_S)
    assert costs.used()["energy_kwh"] == pytest.approx(1.2)
    assert costs.used()["cost_usd"] is None
    assert b.of_kind("energy_used") == []


def test_meter_that_hangs_does_not_hold_up_the_end_of_a_job(bench, monkeypatch):
    stuck = threading.Event()
    monkeypatch.setattr("trainonce.controller.costs._LAST_WORD_S", 0.01)
    energy = EnergyThread(lambda: stuck.wait() and None, every_s=0.001)
    costs = costs_of(bench().ready(), energy=energy)
    costs.finish()
    stuck.set()
