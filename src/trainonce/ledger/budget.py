"""Budgets: one alert for each threshold and job, and a webhook that hears of it."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.events import BudgetCrossed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from trainonce.ledger.economics import Economics
    from trainonce.ledger.prices import BudgetSettings

# An estimate may be corrected downwards. An alert is armed again only when use has fallen
# this far below the threshold, so that it does not flutter.
HYSTERESIS = 0.1
_TIMEOUT_S = 10.0
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A threshold was crossed: the event to append, for which job, and who wants to hear."""

    job: str
    event: BudgetCrossed
    webhook: str

    def to_record(self) -> dict[str, object]:
        """Return what is posted."""
        return {"job": self.job, **self.event.to_record()}


class BudgetWatch:
    """Decides which alerts are due. Pure: it neither posts nor writes.

    Args:
        budgets: From the settings.
        crossed: What the ledger already holds for (job, event), so that a restarted watch
            does not repeat itself.
    """

    def __init__(
        self,
        budgets: Sequence[BudgetSettings],
        crossed: Iterable[tuple[str, BudgetCrossed]] = (),
    ) -> None:
        self._budgets = budgets
        self._fired = {(job, event.budget, event.threshold) for job, event in crossed}

    def observe(self, job: str, project: str, used: Mapping[str, float | None]) -> list[Alert]:
        """Return the alerts that are due now, lowest threshold first.

        Args:
            job: Whose use this is.
            project: Its tag.
            used: Metric to amount so far; None or absent where it is not known.
        """
        due: list[Alert] = []
        for budget in self._budgets:
            amount = used.get(budget.metric)
            if amount is None or (budget.project and budget.project != project):
                continue
            for threshold in sorted(budget.thresholds):
                key = (job, budget.name, threshold)
                mark = threshold * budget.limit
                if amount < mark * (1.0 - HYSTERESIS):
                    self._fired.discard(key)
                elif amount >= mark and key not in self._fired:
                    self._fired.add(key)
                    due.append(_alert(job, budget, threshold, amount))
        return due


def amounts(elapsed_s: float, money: Economics) -> dict[str, float | None]:
    """Return what a job has used so far, by the metrics that budgets know."""
    return {
        "hours": elapsed_s / 3600.0,
        "cost_usd": money.cost_usd,
        "energy_kwh": money.energy.facility_kwh,
        "gpu_hours": money.gpu_hours,
    }


def post(
    alert: Alert, on_error: Callable[[str], None], *, after: threading.Thread | None = None
) -> threading.Thread | None:
    """Send `alert` to its webhook as JSON, from a thread of its own.

    Args:
        alert: Without a webhook nothing is done.
        on_error: Called with one line when it could not be delivered after some tries.
        after: Delivers the alert before, which is to arrive first.

    Returns:
        The thread, for whoever wants to wait; None without a webhook.
    """
    if not alert.webhook:
        return None
    thread = threading.Thread(
        target=_deliver, args=(alert, on_error, after), name="trainonce-webhook", daemon=True
    )
    thread.start()
    return thread


def _alert(job: str, budget: BudgetSettings, threshold: float, amount: float) -> Alert:
    event = BudgetCrossed(
        budget=budget.name,
        metric=budget.metric,
        limit=budget.limit,
        threshold=threshold,
        used=amount,
    )
    return Alert(job=job, event=event, webhook=budget.webhook)


def _deliver(alert: Alert, on_error: Callable[[str], None], after: threading.Thread | None) -> None:
    if after is not None:
        after.join()
    request = urllib.request.Request(
        alert.webhook,
        data=json.dumps(alert.to_record()).encode(),
        headers={"Content-Type": "application/json"},
    )
    reason = ""
    for _ in range(_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            error.close()
            if error.code < 500:  # asking again would not help
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error)
    on_error(f"the alert of budget {alert.event.budget!r} did not reach its webhook: {reason}")
