"""The meter of money and energy, and what a budget says to it."""

import pytest

from trainonce.clock import FakeClock
from trainonce.errors import BudgetSpentError, ConfigError
from trainonce.ledger.energy import TdpMeter
from trainonce.ledger.prices import Prices
from trainonce.ledger.spending import Action, Budget, BudgetGate, SpendingMeter


@pytest.fixture
def clock():
    return FakeClock()


def test_money_is_hours_times_devices_times_price_and_energy_has_the_pue(clock):
    prices = Prices(usd_per_gpu_hour=2.0, pue=1.5)
    meter = SpendingMeter(4, prices, TdpMeter(1000.0, clock), clock=clock)
    clock.advance(1800.0)
    assert meter.used() == pytest.approx({"max_hours": 0.5, "max_cost_usd": 4.0, "max_kwh": 0.75})
    meter.restart({"max_hours": 2.0, "max_cost_usd": 10.0})
    clock.advance(3600.0)
    assert meter.used() == pytest.approx({"max_hours": 3.0, "max_cost_usd": 18.0, "max_kwh": 1.5})


def test_what_cannot_be_known_is_not_reported_and_cannot_be_limited(clock):
    meter = SpendingMeter(1, Prices(), None, clock=clock)
    assert set(meter.used()) == {"max_hours"}
    for budget in (Budget(max_cost_usd=1), Budget(max_kwh=1)):
        with pytest.raises(ConfigError, match="cannot be kept") as caught:
            BudgetGate(budget, meter.used())
        assert caught.value.hint


def test_a_budget_warns_once_at_80_percent_and_stops_at_100():
    gate = BudgetGate(Budget(max_hours=10.0, max_kwh=100.0), {"max_hours": 0.0, "max_kwh": 0.0})
    hours = (1.0, 7.9, 8.0, 9.0, 10.0, 11.0)
    found = [gate.decide({"max_hours": h, "max_kwh": 1.0}) for h in hours]
    expected = [Action.GO_ON, Action.GO_ON, Action.WARN, Action.GO_ON, Action.STOP, Action.STOP]
    assert [each.action for each in found] == expected
    assert found[2].reason == "8 of 10 hours (80%)"


def test_the_limit_that_is_closest_decides():
    gate = BudgetGate(Budget(max_hours=10.0, max_kwh=1.0), {"max_hours": 0.0, "max_kwh": 0.0})
    decision = gate.decide({"max_hours": 1.0, "max_kwh": 0.9})
    assert (decision.action, decision.reason) == (Action.WARN, "0.9 of 1 kWh (90%)")


def test_a_budget_that_is_spent_already_is_an_error_with_a_hint():
    with pytest.raises(BudgetSpentError, match="3 of 2 hours") as caught:
        BudgetGate(Budget(max_hours=2.0), {"max_hours": 3.0})
    assert caught.value.hint


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1"])
def test_limits_are_positive_numbers(value):
    with pytest.raises(ConfigError, match="max_kwh"):
        Budget(max_kwh=value)


def test_no_budget_says_nothing():
    gate = BudgetGate(Budget(), {})
    assert not gate.has_limits
    assert gate.decide({"max_hours": 1e9}).action is Action.GO_ON
