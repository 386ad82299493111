"""Numbers and incidents as a person would say them, and texts that fit a line."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainonce.events import Incident

_LONGEST = 200


def one_line(text: str) -> str:
    """Return the first line of a text, such as an exception's, and not too much of it."""
    line = text.partition("\n")[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def count(number: int, noun: str, plural: str = "s") -> str:
    """Return a number and its noun, in the plural where it is not one."""
    return f"{number} {noun}" + (plural if number != 1 else "")


def when(wall_s: float) -> str:
    """Return local date and time to the minute."""
    return datetime.datetime.fromtimestamp(wall_s).astimezone().strftime("%Y-%m-%d %H:%M")


def day(wall_s: float) -> str:
    """Return the date in UTC."""
    return datetime.datetime.fromtimestamp(wall_s, datetime.UTC).strftime("%Y-%m-%d")


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 1 or seconds == 0 else f"{seconds:.3f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def percent(share: float | None) -> str:
    """Return a share as a percentage; "?" where unknown."""
    return "?" if share is None else f"{100 * share:.1f} %"


def usd(amount: float | None) -> str:
    """Return money; "?" where unknown."""
    if amount is None:
        return "?"
    sign = "-" if amount < 0 else ""
    return (
        f"{sign}${abs(amount):,.2f}"
        if abs(amount) >= 0.01 or not amount
        else f"{sign}${abs(amount):.5f}"
    )


def hours(number: float) -> str:
    """Return GPU hours with a sensible number of digits."""
    return f"{number:,.1f} GPU-h" if abs(number) >= 10 else f"{number:.4f} GPU-h"


def quantity(number: float) -> str:
    """Return an amount to four digits, and without an exponent where it is large."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def size(number: int) -> str:
    """Return bytes in a unit that suits them."""
    amount, units = float(number), ["B", "KB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.1f} {units[0]}" if units[0] != "B" else f"{number} B"


def sentence(incident: Incident) -> str:
    """Return what happened to a rank, in one sentence."""
    ranks = ", ".join(map(str, incident.ranks)) or "?"
    who = f"rank{'s' if len(incident.ranks) > 1 else ''} {ranks}"
    if incident.host:
        who += f" on {incident.host}"
    moved = "moved" if incident.served_by == "migration" else "was to move"
    event = moved if incident.planned else "failed"
    served = "not served" if incident.served_by == "none" else f"served by {incident.served_by}"
    words = [
        (f"step {incident.step}: {who} {event} ({incident.cause}: {one_line(incident.detail)}), "
        f"seen by {incident.detected_by} after {incident.detected_s:.2f} s; {served}"),
        f"pause {incident.pause_s:.3f} s"
        + (f", {incident.waited_for_spare_s:.2f} s of it waiting for a worker"
           if incident.waited_for_spare_s else ""),
        count(incident.steps_lost, "committed step") + " lost",
        count(incident.micro_batches_recomputed, "micro-batch", "es") + " recomputed",
        f"{size(incident.bytes_moved)} moved",
    ]  # fmt: skip
    if incident.digest_before or incident.digest_after:
        same = incident.digest_before == incident.digest_after
        before, after = incident.digest_before[:12] or "?", incident.digest_after[:12] or "?"
        words.append(
            f"digest {before} on both sides" if same else f"digest {before} became {after}"
        )
    return ", ".join(words)
